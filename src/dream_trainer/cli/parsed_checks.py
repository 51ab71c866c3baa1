"""What jsonargparse lets pass, or does not tell, found once everything has been parsed."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any

from jsonargparse import Namespace

from dream_trainer.cli.explanations import Mistake, mistakes_of
from dream_trainer.cli.given_options import GivenOption, Input
from dream_trainer.errors import ConfigError


def comments_for_null(given: Input, parsed: Namespace) -> list[Mistake]:
    """Values such as ``#3``: jsonargparse reads YAML, where they are comments, and takes null."""
    values = [(one.name, one.place, one.value) for one in given.options]
    values += [
        (".".join(map(str, path)), given.files.place(path), given.files.value(path))
        for name in given.files.content
        for path in given.files.paths(name)
    ]
    return [
        Mistake(place, f"{name}: expected a value or null, got {value!r}", key=name)
        for name, place, value in values
        if isinstance(value, str) and value.lstrip().startswith("#") and parsed.get(name, 0) is None
    ]


def nulls_for_values(
    given: Input,
    parsed: Namespace,
    known: Container[str],
    default: Callable[[str], Any],
    parse: Callable[[Input], Any],
) -> list[Mistake]:
    """Nulls of files where a value belongs: jsonargparse lets them pass for every type.

    Args:
        given: what was parsed.
        parsed: what became of it.
        known: dotted names of all options.
        default: of an option, by dotted name.
        parse: parses, and returns the exception if that fails.
    """
    found = []
    for path in [path for name in given.files.content for path in given.files.paths(name)]:
        name = ".".join(map(str, path))
        if given.files.value(path) is not None or parsed.get(name, 0) is not None:
            continue
        if name not in known or (default(name) is None and "init_args" not in path):
            continue
        option = GivenOption(name, (f"--{name}=null",), name)
        trial = parse(Input(given.files.without(path), [*given.options, option]))
        if isinstance(trial, Exception) or trial.get(name) is not None:
            place = f"{given.files.place(path)}: {name}"
            found.append(Mistake(place, "expected a value, got null", key=name))
    return found


def section_problems(config_class: type, parsed: Namespace) -> list[Mistake]:
    """What the sections that are plain data say of their own values."""
    found = []
    for field in dataclasses.fields(config_class):
        value = parsed.get(field.name)
        made = type(_default_of(field))
        if not is_section(value) or not dataclasses.is_dataclass(made):
            continue
        plain = {key: entry for key, entry in value.items() if not key.count(".")}
        try:
            made(**plain)
        except ConfigError as error:
            found += mistakes_of(error)
        except (TypeError, ValueError):
            continue  # holds a class that is not made yet
    return found


def with_near_arguments(mistakes: Sequence[Mistake], parsed: Namespace) -> list[Mistake]:
    """The same; an argument that a class does not have comes with the one that was meant."""
    told = []
    for mistake in mistakes:
        if unknown := re.search(r"has no argument (\w+)$", mistake.problem):
            arguments = [name for spec in _specs(parsed.get(mistake.key)) for name in spec]
            if near := difflib.get_close_matches(unknown[1], arguments, n=1):
                problem = f"{mistake.problem}; did you mean {near[0]}?"
                mistake = dataclasses.replace(mistake, problem=problem)
        told.append(mistake)
    return told


def is_section(value: object) -> bool:
    """Whether a parsed value is a nested dataclass, and no class that is named."""
    return isinstance(value, Namespace) and "class_path" not in value


def _specs(value: Any) -> Iterator[Sequence[str]]:
    """The names of the arguments of each class in a value, which may be a mapping of them."""
    if not isinstance(value, (Mapping, Namespace)):
        return
    if "class_path" in value:
        arguments = value.get("init_args")
        yield list(arguments.keys() if arguments is not None else ())
    else:
        for entry in value.values():
            yield from _specs(entry)


def _default_of(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default
