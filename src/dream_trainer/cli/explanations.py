"""What jsonargparse finds wrong, in one line that names the place."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dream_trainer.cli.config_files import has_key
from dream_trainer.errors import ConfigError

Files = Mapping[str, Mapping[str, Any]]


def explained(
    message: str, files: Files, options: Sequence[str], known: Iterable[str], prog: str
) -> ConfigError:
    """The error to raise for one of jsonargparse.

    Args:
        message: of its ``ArgumentError``.
        files: content of the files, by path and in order.
        options: the words of the command line.
        known: dotted names of all options.
        prog: the command, for the hint at its help.
    """
    help_move = f"'{prog} --help' lists the options."
    if found := re.match(r"unrecognized arguments: (.*)", message, re.DOTALL):
        words = [word.partition("=")[0] for word in found[1].split()]
        unknown = [word for word in words if word.startswith("-")] or words[:1]
        known = list(known)
        return ConfigError("options", [_unknown(word, known) for word in unknown], help_move)
    if found := re.match(r"(?:Group '(.*)' does not accept option|Option) '(.*?)'", message):
        key = ".".join(part for part in found.groups() if part)
        place = _file_of(key, files, options) or "options"
        return ConfigError(place, [_unknown(key, known)], help_move)
    if found := re.match(r"the following arguments are required: (.*)", message):
        names = [name.strip() for name in found[1].split(",")]
        missing = [f"--{name} has no value and no default" for name in names]
        return ConfigError("options", missing, "Give it as an option or in a file.")
    key, problem = _key_and_problem(message)
    path = _file_of(key, files, options)
    return ConfigError(f"{path}: {key}" if path else f"--{key}" if key else "options", [problem])


def _unknown(name: str, known: Iterable[str]) -> str:
    bare, known = name.lstrip("-"), list(known)
    near = [one for one in known if one.endswith(f".{bare}")]  # only the section is missing
    near = near or difflib.get_close_matches(bare, known, n=2, cutoff=0.7)
    dashes = "--" if name.startswith("-") else ""
    hint = " or ".join(f"{dashes}{one}" for one in near)
    return f"there is no {name}" + (f"; did you mean {hint}?" if hint else "")


def _file_of(key: str, files: Files, options: Sequence[str]) -> str:
    """The file that the value of a key comes from; empty if it is an option's."""
    names = (option.removeprefix("--").partition("=")[0] for option in options)
    if any(f"{name}.".startswith(f"{key}.") or key.startswith(f"{name}.") for name in names):
        return ""
    # The later file is the one whose value is used.
    latest_first = reversed(list(files.items()))
    return next((path for path, content in latest_first if has_key(content, key)), "")


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
    given = re.search(r"Given value: (.*)", detail, re.DOTALL)
    given = given or re.search(r"Got value: (.*)", detail, re.DOTALL)
    detail = re.split(r"\s*Given value type:", detail)[0]
    detail = detail.partition("Errors:")[2] or detail
    # Of several types each may repeat the value, on the line of its own.
    detail = re.sub(r"\.?[ ]*Got value:.*?(?=\n\s*- |\Z)", "", detail, flags=re.DOTALL)
    causes = [_one_line(part) for part in re.split(r"^\s*- ", detail, flags=re.MULTILINE)]
    causes = [cause for cause in causes if cause]
    # A class that cannot be made says more than the type it should have had.
    reasons = [cause for cause in causes if not cause.startswith("Expected a ")]
    if reasons:
        return key, "; ".join(reasons)
    wanted = [_type_name(cause.removeprefix("Expected a ")) for cause in causes]
    got = f", got {_one_line(given[1])!r}" if given else ""
    if given and wanted == ["list"]:
        got += f"; write [{_one_line(given[1])}]"
    return key, f"expected {' or '.join(dict.fromkeys(wanted))}{got}"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _type_name(name: str) -> str:
    name = name.strip().rstrip(".")
    if found := re.fullmatch(r"<class '(?:\w+\.)*(\w+)'>", name):
        return {"NoneType": "null", "str": "text"}.get(found[1], found[1])
    if found := re.fullmatch(r"typing\.Literal\[(.*)\]", name):
        return " or ".join(part.strip() for part in found[1].split(","))
    return name
