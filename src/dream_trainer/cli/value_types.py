"""Types that jsonargparse is taught: durations, sizes, torch's dtypes, and 1 beside 1.0."""

from __future__ import annotations

import sys
from datetime import timedelta
from typing import Any

import yaml
from jsonargparse.typing import RegisteredType, register_type, registered_type_handlers

from dream_trainer.configs.numbers import is_number
from dream_trainer.configs.quantities import Duration, Size, duration_text
from dream_trainer.configs.yaml_text import load_yaml


class _WrittenTimedelta(timedelta):
    """A ``timedelta`` that knows how it was written, and prints so in a configuration."""

    duration: Duration

    def __reduce__(self) -> tuple[Any, ...]:
        return _timedelta, (self.duration.plain,)  # a parser copies what it has parsed


def register_value_types() -> None:
    """Let options and files have these types, and print them back as they were written.

    It may be called again; after torch has been loaded it registers ``torch.dtype``, too.
    """
    # Without exceptions of its own jsonargparse puts nothing in front of what ours say.
    register_type(Duration, _plain, Duration, ())
    register_type(Size, _plain, Size, ())
    # jsonargparse has one of its own, for which 30m is no time.
    register_type(timedelta, _timedelta_plain, _timedelta, (), _is_timedelta)
    # Nobody has a dtype in a configuration without having loaded torch.
    if (torch := sys.modules.get("torch")) is not None:
        register_type(torch.dtype, _dtype_name, _dtype, ())
    # Of `float | int` jsonargparse tries float first, which takes 1 and makes it 1.0.
    _register_union(int | float, _number, is_number)
    _register_union(int | float | None, _number_or_null, _is_number_or_none)


def _register_union(union: Any, deserializer: Any, type_check: Any) -> None:
    # register_type refuses unions, though its table is asked for them; one key stands for any order
    # of the types.
    registered_type_handlers[union] = RegisteredType(
        union, _same, deserializer, (), lambda value, _: type_check(value), __name__
    )


def _plain(value: Any) -> Any:
    return value.plain if isinstance(value, (Duration, Size)) else value


def _is_timedelta(value: Any, kind: type) -> bool:
    return isinstance(value, timedelta)


def _timedelta(value: Any) -> timedelta:
    duration = Duration(value)
    made = _WrittenTimedelta(seconds=duration)
    made.duration = duration
    return made


def _timedelta_plain(value: Any) -> Any:
    if isinstance(value, _WrittenTimedelta):
        return value.duration.plain
    return duration_text(value) if isinstance(value, timedelta) else value


def _dtype(value: Any) -> Any:
    torch = sys.modules["torch"]
    found = getattr(torch, str(value).removeprefix("torch."), None)
    if isinstance(found, torch.dtype):
        return found
    raise ValueError(f"{value!r} is not a dtype of torch: write bfloat16, float32, int64, ...")


def _dtype_name(value: Any) -> str:
    return str(value).removeprefix("torch.")


def _same(value: Any) -> Any:
    return value


def _number(value: Any) -> Any:
    found = _read(value)
    if is_number(found):
        return found
    raise ValueError(f"Expected a number. Got value: {value}")


def _number_or_null(value: Any) -> Any:
    return None if _read(value) is None else _number(value)


def _is_number_or_none(value: object) -> bool:
    return value is None or is_number(value)


def _read(value: Any) -> Any:
    try:
        return load_yaml(value) if isinstance(value, str) else value
    except yaml.YAMLError:
        return value
