"""What jsonargparse finds wrong, in one line that names the place."""

from __future__ import annotations

import difflib
import importlib
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dream_trainer.cli.config_files import Given
from dream_trainer.cli.given_options import Cause, GivenOption, Input, touches
from dream_trainer.errors import ConfigError

_A_CLASS = "the dotted name of a class"
_NO_VALUE = "has no value and no default"
#: Files whose frames say nothing about what fails in a module that is imported.
_OURS = (str(Path(__file__).parent), str(Path(importlib.__file__).parent))


@dataclass(frozen=True)
class Mistake:
    """One thing that is wrong.

    Args:
        place: file and line, variable or option.
        problem: a sentence.
        next_move: what to do about it.
        key: dotted name of the option it is about.
        is_missing: whether nothing was given, rather than something wrong.
        error: what was raised by code of the user's.
    """

    place: str
    problem: str
    next_move: str = ""
    key: str = ""
    is_missing: bool = False
    error: Exception | None = None


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
    error = next((one.error for one in mistakes if one.error), None)
    if len({one.place for one in mistakes}) == 1:
        problems = dict.fromkeys(one.problem for one in mistakes)
        raise ConfigError(mistakes[0].place, list(problems), next_move) from error
    said = dict.fromkeys(f"{one.place}: {one.problem}" for one in mistakes)
    raise ConfigError(f"{len(said)} mistakes", list(said), next_move) from error


def import_problem(name: str, error: Exception) -> str:
    """Why a module of the user's cannot be imported, and where it fails."""
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [one for one in frames if not one.filename.startswith(("<", *_OURS))]
    where = f" ({theirs[-1].filename}:{theirs[-1].lineno})" if theirs else ""
    return f"{name} cannot be imported: {type(error).__name__}: {_one_line(str(error))}{where}"


class Explainer:
    """Finds what in an input is wrong, though jsonargparse stops at the first mistake.

    Args:
        known: dotted names of all options.
        classes: short names of classes that may be meant.
        prog: the command, for the hint at its help.
        parse: parses, and returns the exception if that fails.
    """

    def __init__(
        self,
        known: Sequence[str],
        classes: Sequence[str],
        prog: str,
        parse: Callable[[Input], Any],
    ) -> None:
        self._known, self._classes, self._parse = known, classes, parse
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
            problem = _NO_VALUE
            move = "Give it as an option or in a file."
            return [
                Mistake(f"--{one}", problem, move, one, is_missing=True) for one in missing
            ], None
        if found := re.match(r'Linked "(.*?)" must be given via "(.*)"', message):
            key, problem = found[1], f"follows from {found[2]} by a link: give that instead"
        else:
            key, problem = _key_and_problem(message)
        problem = problem or type(error).__name__
        cause = self._cause(key, problem, given) if key else None
        if cause is None:
            place, is_missing = f"--{key}" if key else "options", problem.endswith("got null")
            return [Mistake(place, _NO_VALUE if is_missing else problem, "", key, is_missing)], None
        problem, failed = self._of_class(cause.value, problem)
        is_short = isinstance(cause.value, str | int)
        if is_short and "expected " in problem and ", got " not in problem:
            problem += f", got {str(cause.value)!r}"
        return [Mistake(cause.place, problem, key=key, error=failed)], cause.rest

    def _of_class(self, value: Any, problem: str) -> tuple[str, Exception | None]:
        """A problem in other words, if a class was meant that is not there; and why it is not."""
        name = value.get("class_path") if isinstance(value, dict) else value
        if not isinstance(name, str) or not all(part.isidentifier() for part in name.split(".")):
            return problem, None
        if problem.startswith("expected ") and _A_CLASS not in problem:
            return problem, None  # text with a dot in it: nothing is imported for that
        module, _, last = name.rpartition(".")
        if not module:
            if _A_CLASS not in problem:
                return problem, None
            near = difflib.get_close_matches(last, self._classes, n=1)
            hint = f"; did you mean {near[0]}?" if near else "; write its dotted name"
            return f"there is no class {last} here{hint}", None
        if isinstance(value, str) and _A_CLASS in problem and module not in sys.modules:
            problem = f"there is no class {name}"
        try:
            # It has been tried already, and failed or is loaded: this finds out why.
            importlib.import_module(module)
        except Exception as error:  # noqa: BLE001  whatever a module of the user's raises
            return import_problem(name, error), error
        return problem, None

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

    def _cause(self, key: str, problem: str, given: Input) -> Cause | None:
        """The value behind a problem at a dotted name."""
        causes = given.causes(key)
        if len(causes) <= 1:
            return causes[0] if causes else None
        with_another = None
        for cause in causes:
            trial = self._parse(cause.rest)
            if not isinstance(trial, Exception):
                return cause
            new_key, new_problem = _key_and_problem(str(trial))
            if new_key != key:
                return cause if cause.is_part or with_another is None else with_another
            if new_problem != problem and with_another is None:
                with_another = cause  # the value has another mistake besides
        if with_another is not None:
            return with_another
        rest = given
        for one in given.options:
            rest = rest.without(one) if touches(one.name, key) else rest
        if path := next(iter(_shallowest(given.files, key)), None):
            rest = Input(rest.files.without(path), rest.options)
        whole = next((one for one in causes if not one.is_part), causes[0])
        return Cause(whole.place, whole.value, rest, False)

    def _unknown(self, name: str) -> str:
        bare = name.lstrip("-")
        # Only its section may be missing.
        near = [one for one in self._known if one.endswith(f".{bare}")]
        near = near or difflib.get_close_matches(bare, self._known, n=2, cutoff=0.7)
        dashes = "--" if name.startswith("-") else ""
        hint = " or ".join(f"{dashes}{one}".replace(".init_args", "") for one in near)
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
    found_text = _one_line(given[1]) if given else ""
    got = (f", got {found_text!r}" if found_text != "None" else ", got null") if given else ""
    if given and wanted == ["list"]:
        got += f"; write [{_one_line(given[1])}]"
    return key, f"expected {' or '.join(dict.fromkeys(wanted))}{got}"


def _plainly(cause: str) -> str:
    """The same without the words of jsonargparse that name its own types."""
    cause = re.sub(r"^.*Invalid subclass spec given as value for type Any: ", "", cause)
    cause = re.sub(r"^Type \S.*? expects a function or a callable class: ", "", cause)
    cause = re.sub(r"^Problem with given class_path '(.*?)': ", r"\1: ", cause)
    cause = re.sub(r": Option '(.*?)' is not accepted", r" has no argument \1", cause)
    cause = re.sub(r"^Option '(.*?)' is not accepted", r"it has no argument \1", cause)
    # What a name stands for in the program itself is not known here.
    cause = re.sub(r"^(dream_trainer\.Callback has no)", r"no class is named for it, and \1", cause)
    if nested := re.match(r'(.*): Parser key "(.*?)": Expected a (.*)', cause):
        return f"{nested[1]}: {nested[2]}: expected {_type_name(nested[3])}"
    return cause


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
