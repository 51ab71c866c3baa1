"""Where configurations, as plain data, differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


class Absent:
    """Stands for a value that one configuration does not have."""

    def __repr__(self) -> str:
        return "-"


ABSENT = Absent()


def differing(configs: Sequence[Any]) -> dict[str, list[Any]]:
    """Dotted names of the values that are not the same in all, with the value in each.

    Args:
        configs: nested plain data, at least one.
    """
    flat = [flattened(one) for one in configs]
    names = dict.fromkeys(name for one in flat for name in one)
    values = {name: [one.get(name, ABSENT) for one in flat] for name in names}
    return {
        name: found
        for name, found in values.items()
        # 1, 1.0 and True are equal in Python and not the same here.
        if any((type(one), one) != (type(found[0]), found[0]) for one in found)
    }


def flattened(config: Any, place: str = "") -> dict[str, Any]:
    """Values by dotted name; a list and an empty mapping are values."""
    if not isinstance(config, Mapping) or not config:
        return {place: config} if place else {}
    return {
        name: value
        for key, entry in config.items()
        for name, value in flattened(entry, f"{place}.{key}".lstrip(".")).items()
    }
