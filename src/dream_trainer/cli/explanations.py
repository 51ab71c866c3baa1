"""What jsonargparse finds wrong, in one line that names the place."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dream_trainer.cli.config_files import Given
from dream_trainer.cli.given_options import GivenOption, Input, touches
from dream_trainer.errors import ConfigError

_A_CLASS = "the dotted name of a class"


@dataclass(frozen=True)
class Mistake:
    """One thing that is wrong.

    Args:
        place: file and line, variable or option.
        problem: a sentence.
        next_move: what to do about it.
        key: dotted name of the option it is about.
        is_missing: whether nothing was given, rather than something wrong.
    """

    place: str
    problem: str
    next_move: str = ""
    key: str = ""
    is_missing: bool = False


def mistakes_of(error: ConfigError) -> list[Mistake]:
    """The problems of an error, one by one."""
    return [Mistake(error.place, one, error.next_move) for one in error.problems]


def raise_all(mistakes: Sequence[Mistake]) -> None:
    """Raise one error for all mistakes, if there are any.

    Raises:
        ConfigError: of the one place, or of several.
    """
    if not mistakes:
        return
    next_move = next((one.next_move for one in mistakes if one.next_move), "")
    if len({one.place for one in mistakes}) == 1:
        problems = dict.fromkeys(one.problem for one in mistakes)
        raise ConfigError(mistakes[0].place, list(problems), next_move)
    said = dict.fromkeys(f"{one.place}: {one.problem}" for one in mistakes)
    raise ConfigError(f"{len(said)} mistakes", list(said), next_move)


class Explainer:
    """Finds what in an input is wrong, though jsonargparse stops at the first mistake.

    Args:
        known: dotted names of all options.
        prog: the command, for the hint at its help.
        parse: parses, and returns the exception if that fails.
    """

    def __init__(self, known: Sequence[str], prog: str, parse: Callable[[Input], Any]) -> None:
        self._known, self._parse = known, parse
        self._help_move = f"'{prog} --help' lists the options."

    def explain(self, error: Exception, given: Input) -> tuple[list[Mistake], Input | None]:
        """The mistakes behind an error, and the input without them; None if they stay unknown."""
        message = str(error)
        if found := re.match(r"unrecognized arguments: (.*)", message, re.DOTALL):
            return self._unrecognized(found[1], given)
        if found := re.match(r"(?:Group '(.*)' does not accept option|Option) '(.*?)'", message):
            return self._unknown_key(".".join(part for part in found.groups() if part), given)
        if found := re.match(r"the following arguments are required: (.*)", message):
            missing = [name.strip().removeprefix("--") for name in found[1].split(",")]
            problem = "has no value and no default"
            move = "Give it as an option or in a file."
            return [
                Mistake(f"--{one}", problem, move, one, is_missing=True) for one in missing
            ], None
        key, problem = _key_and_problem(message)
        if not isinstance(error, ValueError) and not key and not problem:
            problem = type(error).__name__
        place, rest = self._cause(key, problem, given) if key else ("", None)
        return [Mistake(place or (f"--{key}" if key else "options"), problem, key=key)], rest

    def _unrecognized(self, said: str, given: Input) -> tuple[list[Mistake], Input | None]:
        mistakes, left = [], []
        for one in given.options:
            first = one.words[0]
            if first.startswith("--") and f" {first} " in f" {said} ":
                bare = one.place.startswith("--")
                place, name = ("options", one.place) if bare else (one.place, one.name)
                mistakes.append(Mistake(place, self._unknown(name), self._help_move, one.name))
                continue
            strays = [word for word in one.words[1:] or [first] if f" {word} " in f" {said} "]
            kept = tuple(word for word in one.words if word not in strays)
            if strays and not first.startswith("--"):
                kept = ()
            mistakes += [
                Mistake("options", f"there is no {one}", self._help_move) for one in strays
            ]
            left += [GivenOption(one.name, kept, one.place)] if kept else []
        if not mistakes:
            return [Mistake("options", f"there is no {said}", self._help_move)], None
        return mistakes, Input(given.files, left)

    def _unknown_key(self, key: str, given: Input) -> tuple[list[Mistake], Input | None]:
        for one in given.options:
            if one.name == key:
                place = "options" if one.place.startswith("--") else one.place
                mistake = Mistake(place, self._unknown(key), self._help_move, key)
                return [mistake], given.without(one)
        path = next(iter(_shallowest(given.files, key)), None)
        place = given.files.place(path) if path else ""
        mistake = Mistake(place or "options", self._unknown(key), self._help_move, key)
        return [mistake], Input(given.files.without(path), given.options) if path else None

    def _cause(self, key: str, problem: str, given: Input) -> tuple[str, Input | None]:
        """Place of the value behind a problem at a dotted name, and the input without it."""
        causes = list(given.causes(key))
        if len(causes) == 1:
            return causes[0][:2]
        part = None
        for place, rest, is_part in causes:
            trial = self._parse(rest) if is_part else None
            if trial is None:
                continue
            if not isinstance(trial, Exception):
                return place, rest
            new_key, new_problem = _key_and_problem(str(trial))
            if new_key != key:
                return place, rest
            if new_problem != problem and part is None:
                part = place, rest  # the value has another mistake besides
        if part is not None or not causes:
            return part or ("", None)
        rest = given
        for one in given.options:
            rest = rest.without(one) if touches(one.name, key) else rest
        if path := next(iter(_shallowest(given.files, key)), None):
            rest = Input(rest.files.without(path), rest.options)
        whole = [place for place, _, is_part in causes if not is_part]
        return (whole or [causes[0][0]])[0], rest

    def _unknown(self, name: str) -> str:
        bare = name.lstrip("-")
        near = [
            one for one in self._known if one.endswith(f".{bare}")
        ]  # only its section is missing
        near = near or difflib.get_close_matches(bare, self._known, n=2, cutoff=0.7)
        dashes = "--" if name.startswith("-") else ""
        hint = " or ".join(f"{dashes}{one}" for one in near)
        return f"there is no {name}" + (f"; did you mean {hint}?" if hint else "")


def _shallowest(files: Given, key: str) -> list[tuple[Any, ...]]:
    return list(files.paths(key))[-1:]


def _key_and_problem(message: str) -> tuple[str, str]:
    """What jsonargparse says about a value, in one line.

    Args:
        message: of its ``ArgumentError``.

    Returns:
        The dotted key it is about, or an empty string; and the problem.
    """
    found = re.match(r'Parser key "(?P<key>[^"]+)":\s*(?P<detail>.*)', message, re.DOTALL)
    if found is None:
        return "", _one_line(message)
    key, detail = found["key"], found["detail"]
    given = re.search(r"Given value: (.*?)(?=\. Got value:|\Z)", detail, re.DOTALL)
    given = given or re.search(r"Got value: (.*?)(?=\. Got value:|\Z)", detail, re.DOTALL)
    detail = re.split(r"\s*Given value type:", detail)[0]
    detail = detail.partition("Errors:")[2] or detail
    # Of several types each may repeat the value, on the line of its own.
    detail = re.sub(r"\.?[ ]*Got value:.*?(?=\n\s*- |\Z)", "", detail, flags=re.DOTALL)
    causes = [_one_line(part) for part in re.split(r"^\s*- ", detail, flags=re.MULTILINE)]
    causes = [_plainly(cause) for cause in causes if cause]
    # A class that cannot be made says more than the type it should have had.
    reasons = [cause for cause in causes if not cause.startswith("Expected a ")]
    if reasons:
        return key, "; ".join(reasons)
    wanted = [_type_name(cause.removeprefix("Expected a ")) for cause in causes]
    # An argument may be a number or an object; whoever wrote a wrong number meant a number.
    simple = [name for name in wanted if name not in (_A_CLASS, "null")]
    if len(simple) < len(wanted) and simple:
        wanted = [name for name in wanted if name != _A_CLASS]
    got = f", got {_one_line(given[1])!r}" if given else ""
    if given and wanted == ["list"]:
        got += f"; write [{_one_line(given[1])}]"
    return key, f"expected {' or '.join(dict.fromkeys(wanted))}{got}"


def _plainly(cause: str) -> str:
    """The same without the words of jsonargparse that name its own types."""
    cause = re.sub(r"^Type \S.*? expects a function or a callable class: ", "", cause)
    cause = re.sub(r"^Problem with given class_path '(.*?)': ", r"\1: ", cause)
    cause = re.sub(r": Option '(.*?)' is not accepted", r" has no argument \1", cause)
    cause = re.sub(r"^Option '(.*?)' is not accepted", r"it has no argument \1", cause)
    if nested := re.match(r'(.*): Parser key "(.*?)": Expected a (.*)', cause):
        return f"{nested[1]}: {nested[2]}: expected {_type_name(nested[3])}"
    return re.sub(r": (No module named )", r" cannot be imported: \1", cause)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _type_name(name: str) -> str:
    name = name.strip().rstrip(".")
    if name.startswith("dot import path string"):
        return _A_CLASS
    if found := re.fullmatch(r"<class '(?:\w+\.)*(\w+)'>", name):
        return {"NoneType": "null", "str": "text"}.get(found[1], found[1])
    if found := re.fullmatch(r"typing\.Literal\[(.*)\]", name):
        return " or ".join(part.strip() for part in found[1].split(","))
    return name
