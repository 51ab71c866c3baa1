"""``--preset``: functions of a trainer's author between the files and the options."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dream_trainer.cli.given_options import GivenOption
from dream_trainer.errors import ConfigError

_ABSENT = object()


def with_presets(
    config: Any, names: Sequence[str], trainer_class: type, options: Sequence[GivenOption]
) -> tuple[Any, dict[str, Any]]:
    """A configuration after its presets, in their order; what options set stays.

    Args:
        config: as files, variables and options made it.
        names: of the presets.
        trainer_class: has them.
        options: those of the command line and the environment.

    Returns:
        The configuration, and what became different by dotted name.

    Raises:
        ConfigError: there is no such preset, or what it makes cannot work.
    """
    if not names:
        return config, {}
    # Here, because no other command line needs it.
    from dream_trainer.trainer.presets import presets_of

    there = presets_of(trainer_class)
    problems = []
    for name in names:
        if name not in there:
            near = difflib.get_close_matches(name, there, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            problems.append(f"there is no preset {name}{hint}")
    if problems:
        raise ConfigError("--preset", problems, f"Its presets: {', '.join(there) or 'none'}.")
    made = config
    for name in names:
        made = there[name](made)
        if type(made) is not type(config):
            raise ConfigError(
                "--preset",
                [f"{name} returned a {type(made).__name__}, not a {type(config).__name__}"],
            )
    made = _with_options(config, made, [one.name for one in options])
    return made, dict(_changes(config, made))


def _with_options(before: Any, after: Any, names: Sequence[str]) -> Any:
    """The later configuration with the values of the earlier one under some dotted names."""
    for name in names:
        first, _, rest = name.partition(".")
        old, new = _entry(before, first), _entry(after, first)
        if old is _ABSENT:
            continue
        if rest and new is not _ABSENT and (_is_section(old) or isinstance(old, Mapping)):
            old = _with_options(old, new, [rest])
        if old is not new:
            after = _replaced(after, first, old)
    return after


def _entry(holder: Any, name: str) -> Any:
    if isinstance(holder, Mapping):
        return holder.get(name, _ABSENT)
    return getattr(holder, name, _ABSENT)


def _replaced(holder: Any, name: str, value: Any) -> Any:
    if isinstance(holder, Mapping):
        return {**holder, name: value}
    return dataclasses.replace(holder, **{name: value})


def _is_section(value: object) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _changes(before: Any, after: Any, above: str = "") -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(after):
        old, new = getattr(before, field.name), getattr(after, field.name)
        name = f"{above}{field.name}"
        if _is_section(old) and type(old) is type(new):
            yield from _changes(old, new, f"{name}.")
        elif (type(old), old) != (type(new), new):
            yield name, new
