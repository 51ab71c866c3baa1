"""Another class in place of one whose arguments are given: which of them go on, and saying so."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dream_trainer.cli.config_files import Given, same_class
from dream_trainer.cli.given_options import GivenOption, Input

#: Finds the dotted name of a class that an option takes and the names of its arguments; None if it
#: is no class. Called with the option's name, the class as it was given, and all that is given.
FindClass = Callable[[str, str, Input], "tuple[str, set[str]] | None"]


@dataclass(frozen=True)
class Switched:
    """What is given after all switches.

    Args:
        given: files and options.
        notes: a line about each switch.
        names: dotted names of options for which a class is given.
    """

    given: Input
    notes: list[str]
    names: set[str]


def switch_classes(given: Input, default: Callable[[str], Any], find: FindClass) -> Switched:
    """Let an option that names a class keep the arguments that fit, and drop the others.

    What was given for the class before it (in files, variables and earlier options) is kept if the
    new class has an argument of that name. The defaults of the old class are never kept.

    Args:
        given: what files, variables and options set.
        default: of an option, by dotted name; None if there is none.
        find: looks at a class.
    """
    notes: list[str] = []
    names = {name for name in _named_classes(given.files.content) if default(name) is not None}
    for option in given.options:
        if option not in given.options or not _may_name_class(option.value):
            continue
        before = Before.of(option, given)
        old = before.class_path or class_of_default(default(option.name))
        found = find(option.name, str(option.value), given) if old is not None else None
        if old is None or found is None:
            continue
        names.add(option.name)
        new, accepted = found
        if not same_class(old, new):
            given = before.replaced(new, accepted, given)
            notes += before.told(old, new, accepted)
    return Switched(given, notes, names)


@dataclass(frozen=True)
class Before:
    """What was given for a class before an option named another one.

    Args:
        option: it names the other one.
        class_path: the class; None if only the default says it.
        in_files: arguments that files give.
        in_options: variables and options that give arguments.
        earlier: variables and options that name the class.
    """

    option: GivenOption
    class_path: str | None
    in_files: Mapping[str, Any]
    in_options: Sequence[GivenOption]
    earlier: Sequence[GivenOption]

    @classmethod
    def of(cls, option: GivenOption, given: Input) -> Before:
        """Look it up."""
        options = list(given.options)
        before = options[: options.index(option)]
        spec: Any = given.files.content
        for part in option.name.split("."):
            spec = spec.get(part) if isinstance(spec, Mapping) else None
        arguments = spec.get("init_args") if isinstance(spec, Mapping) else None
        named = [one for one in before if one.name in (option.name, f"{option.name}.class_path")]
        classes = [one.value for one in named if _may_name_class(one.value)]
        return cls(
            option,
            classes[-1] if classes else _class_of(spec),
            arguments if isinstance(arguments, Mapping) else {},
            [one for one in before if one.name.startswith(f"{option.name}.") and one not in named],
            named,
        )

    def replaced(self, new: str, accepted: set[str], given: Input) -> Input:
        """What is given, with the new class and the arguments that it has."""
        kept = {name: value for name, value in self.in_files.items() if name in accepted}
        path = self.option.name.split(".")
        content = _put(given.files.content, path, _class_with(new, kept))
        gone = [
            *self.earlier,
            *(one for one in self.in_options if _name(one, self) not in accepted),
        ]
        options = [one for one in given.options if one is not self.option and one not in gone]
        return Input(Given(content, given.files.places), options)

    def told(self, old: str, new: str, accepted: set[str]) -> list[str]:
        """A line that says what is kept and what is dropped; none if nothing was given."""
        given = {name: (name, repr(value)) for name, value in self.in_files.items()}
        given |= {one.name: (_name(one, self), str(one.value)) for one in self.in_options}
        kept = {name: value for name, value in given.values() if name in accepted}
        dropped = [name for name, _ in given.values() if name not in accepted]
        return note_of_switch(self.option.place, old, new, kept, dropped)


def note_of_switch(
    place: str, old: str, new: str, kept: Mapping[str, str], dropped: Iterable[str]
) -> list[str]:
    """A line that says which arguments another class keeps and drops; none if there were none.

    Args:
        place: what names the new class.
        old: dotted name of the class before.
        new: dotted name of the class now.
        kept: arguments and their values as text.
        dropped: names of arguments.
    """
    parts = [f"keeps {', '.join(f'{k}={v}' for k, v in kept.items())}"] if kept else []
    parts += [f"drops {', '.join(names)}"] if (names := dict.fromkeys(dropped)) else []
    short = " instead of ".join(one.rpartition(".")[2] for one in (new, old))
    return [f"{place}: {short} {' and '.join(parts)}"] if parts else []


def _named_classes(content: Mapping[str, Any], above: str = "") -> list[str]:
    """Dotted names of the values that name a class."""
    found = []
    for key, value in content.items():
        if isinstance(value, Mapping):
            name = f"{above}{key}"
            found += [name] if "class_path" in value else _named_classes(value, f"{name}.")
    return found


def _may_name_class(value: str | None) -> bool:
    return value is not None and all(part.isidentifier() for part in value.split("."))


def _class_of(spec: Any) -> str | None:
    if isinstance(spec, str):
        return spec
    try:
        found = spec["class_path"]
    except (TypeError, KeyError):
        return None
    return found if isinstance(found, str) else None


def class_of_default(default: Any) -> str | None:
    """The name of the class that a default is, or makes; None if it is no such thing."""
    if isinstance(default, type):
        return f"{default.__module__}.{default.__qualname__}"
    return None if isinstance(default, str) else _class_of(default)


def _name(option: GivenOption, before: Before) -> str:
    """The name of the argument that an option gives."""
    below = option.name.removeprefix(f"{before.option.name}.")
    return below.removeprefix("init_args.").partition(".")[0]


def _class_with(class_path: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {"class_path": class_path, **({"init_args": dict(arguments)} if arguments else {})}


def _put(content: Mapping[str, Any], path: Sequence[str], value: Any) -> dict[str, Any]:
    first, *rest = path
    below = content.get(first)
    inner = below if isinstance(below, Mapping) else {}
    return {**content, first: _put(inner, rest, value) if rest else value}
