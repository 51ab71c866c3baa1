"""A field of a configuration by its dotted name, ``data.batch_size``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from dream_trainer.errors import ConfigError

T = TypeVar("T")


def field_value(config: Any, name: str) -> Any:
    """The value of a field.

    Raises:
        ConfigError: there is none of that name.
    """
    value, walked = config, type(config).__name__
    for part in name.split("."):
        known = _fields(value)
        if part not in known:
            shown = ", ".join(sorted(known)) or "none"
            whole = "" if name == part else f" ({name})"
            raise ConfigError(
                "field", [f"{walked} has no field {part!r}{whole}"], f"There is: {shown}."
            )
        value, walked = known[part], f"{walked}.{part}"
    return value


def with_field(config: T, name: str, value: Any) -> T:
    """A copy of a configuration with another value of a field; what it checks is checked again.

    Raises:
        ConfigError: there is no field of that name, or it refuses the value.
    """
    field_value(config, name)
    return _replaced(config, name, value)  # type: ignore[no-any-return]


def _replaced(config: Any, name: str, value: Any) -> Any:
    head, _, rest = name.partition(".")
    new = _replaced(_fields(config)[head], rest, value) if rest else value
    if isinstance(config, Mapping):
        return {**config, head: new}
    return dataclasses.replace(config, **{head: new})


def _fields(config: Any) -> Mapping[str, Any]:
    if isinstance(config, Mapping):
        return config
    if dataclasses.is_dataclass(config):
        return {
            one.name: getattr(config, one.name) for one in dataclasses.fields(config) if one.init
        }
    return {}
