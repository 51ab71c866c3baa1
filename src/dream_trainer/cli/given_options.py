"""The words of a command line, one option at a time, and the options that the environment sets."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dream_trainer.cli.config_files import Given
from dream_trainer.errors import ConfigError


@dataclass(frozen=True)
class GivenOption:
    """An option as it was given.

    Args:
        name: dotted, without dashes; a stray word for one that belongs to no option.
        words: as the command line has them.
        place: what to call it in a message, ``--lr`` or the name of a variable.
    """

    name: str
    words: tuple[str, ...]
    place: str

    @property
    def value(self) -> str | None:
        """The one value; None if there is none, or several."""
        first, equals, value = self.words[0].partition("=")
        if equals:
            return value if len(self.words) == 1 else None
        return self.words[1] if len(self.words) == 2 and first.startswith("--") else None


@dataclass(frozen=True)
class Cause:
    """A value that may be what is wrong.

    Args:
        place: file and line, variable or option.
        value: as it was given.
        rest: all that is given, without it.
        is_part: whether it is a part of the value that was found wrong.
    """

    place: str
    value: Any
    rest: Input
    is_part: bool


@dataclass(frozen=True)
class Input:
    """What is given to the parser: files, then variables and options."""

    files: Given
    options: Sequence[GivenOption]

    def causes(self, key: str) -> list[Cause]:
        """Each value at and below a dotted name, parts before wholes.

        Of both the later ones first, as their values count; of nested ones the deepest first.
        """
        found = [
            Cause(one.place, one.value, self.without(one), one.name != key)
            for one in reversed(self.options)
            if touches(one.name, key)
        ]
        for path in self.files.paths(key):
            place = _told(self.files.place(path), path, key)
            rest = Input(self.files.without(path), self.options)
            is_part = len(path) > key.count(".") + 1
            found.append(Cause(place, self.files.value(path), rest, is_part))
        return sorted(found, key=lambda one: not one.is_part)

    def without(self, option: GivenOption) -> Input:
        """All but one option."""
        return Input(self.files, [one for one in self.options if one is not option])


def of_command_line(words: Sequence[str]) -> list[GivenOption]:
    """Every option with its values, in their order."""
    groups: list[list[str]] = []
    for word in words:
        if word.startswith("--") or not groups:
            groups.append([word])
        else:
            groups[-1].append(word)
    found = []
    for group in groups:
        name = group[0].partition("=")[0]
        found.append(GivenOption(name.removeprefix("--").rstrip("+"), tuple(group), name))
    return found


def of_environment(
    environment: Mapping[str, str], prefix: str, known: Iterable[str]
) -> list[GivenOption]:
    """The options that variables set: ``PREFIX_TRAINING_PARAMETERS__MAX_STEPS=10``.

    Args:
        environment: variables by name.
        prefix: what their names begin with; the option's name follows in capitals, with two
            underscores for a dot.
        known: dotted names of all options.

    Raises:
        ConfigError: naming every variable that is no option.
    """
    names = {_variable(prefix, name): name for name in known}
    found, problems = [], []
    for variable in sorted(environment):
        if not variable.startswith(prefix):
            continue
        name = _option(variable, prefix, names)
        if re.fullmatch(r"[\w.]+", name) is None:
            problems.append(f"{variable} names no option")
            continue
        found.append(GivenOption(name, (f"--{name}={environment[variable]}",), variable))
    if problems:
        raise ConfigError("environment", problems)
    return found


def touches(name: str, key: str) -> bool:
    """Whether one of two dotted names is, or contains, the other."""
    return f"{name}.".startswith(f"{key}.") or f"{key}.".startswith(f"{name}.")


def _told(place: str, path: Sequence[Any], key: str) -> str:
    if place.startswith("--"):
        return place
    name = ".".join(str(part) for part in path)
    return f"{place}: {name.replace('.init_args', '') or key}" if place else ""


def _variable(prefix: str, name: str) -> str:
    return prefix + name.upper().replace(".", "__")


def _option(variable: str, prefix: str, names: Mapping[str, str]) -> str:
    """The option that a variable sets, in the letters of the longest name that is known."""
    parts = variable.split("__")
    for length in range(len(parts), 0, -1):
        if (name := names.get("__".join(parts[:length]))) is not None:
            return ".".join([name, *(part.lower() for part in parts[length:])])
    return variable.removeprefix(prefix).lower().replace("__", ".")
