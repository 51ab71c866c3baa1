"""What counts as a number in a configuration; True and False do not."""

from __future__ import annotations

import math


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


def not_a_share(name: str, value: object, unit: str) -> list[str]:
    """What is wrong with a setting that is None, a count, or a fraction: a sentence or nothing.

    Args:
        name: of the setting.
        value: 1 is one, 1.0 is the whole.
        unit: what a count counts.
    """
    if value is None or is_count(value) or (isinstance(value, float) and 0 < value <= 1):
        return []
    if not isinstance(value, float) or not 1 < value < math.inf:
        return [f"{name}={value!r} is neither a whole number above 0 nor a fraction up to 1.0"]
    meant = f"{value:.0f} for {value:.0f} {unit}" if value.is_integer() else f"a number of {unit}"
    return [
        f"{name}={value!r} is more than the whole, which is 1.0: write {meant} without a decimal "
        "point, or a fraction up to 1.0"
    ]


def share_of(value: int | float | None, length: int | None) -> int | None:
    """How many a setting allows, of ``length``; None is no limit.

    Raises:
        ValueError: it is a fraction, and the length is not known.
    """
    if value is None or (value == 1.0 and isinstance(value, float)):
        return None
    if isinstance(value, int):
        return value
    if length is None:
        raise ValueError("a fraction of an unknown length")
    # 0.07 * 100 is 7.000000000000001, and an eighth was not asked for.
    return max(1, math.ceil(round(value * length, 6)))
