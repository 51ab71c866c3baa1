"""What counts as a number in a configuration; True and False do not."""

from __future__ import annotations


def is_count(value: object) -> bool:
    """Whether it is a whole number above 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def is_number(value: object) -> bool:
    """Whether it is a number, whole or not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def not_above_zero(name: str, value: object) -> list[str]:
    """What is wrong with a setting that is None or a number above 0: a sentence or nothing."""
    if value is None or (isinstance(value, (int, float)) and is_number(value) and value > 0):
        return []
    return [f"{name}={value!r} is not a number above 0"]
