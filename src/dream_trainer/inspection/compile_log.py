"""What torch's compiler tells while it works, as data."""

from __future__ import annotations

import linecache
import logging
import os
import re
import textwrap
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

#: In brackets: that a stack is left out, since it has been shown before.
_PLACE = re.compile(r"[Gg]raph break(?: \(.*?\))? in user code at (?P<file>.*):(?P<line>\d+)\n")
_REASON = re.compile(r"Reason: (?P<reason>.*?)(?:\nUser code traceback|\Z)", re.DOTALL)
_FUNCTION = re.compile(r"Recompiling function (?P<name>\S+) in (?P<file>.*):(?P<line>\d+)")
_GUARD = re.compile(r"^\s*- (?:\d+/\d+: )(?P<guard>\S.*)$", re.MULTILINE)
_PLAIN_GUARD = re.compile(r"^\s*- (?P<guard>\S.*)$", re.MULTILINE)
_SOURCE = re.compile(r"\s+# (?P<code>.*?)\s+# (?P<file>\S+):(?P<line>\d+) in \S+")
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in')
_RESUMED = re.compile(r"torch_dynamo_resume_in_(?P<name>\S+)_at_(?P<line>\d+)")
#: What dynamo says before it comes to the point.
_PREAMBLE = "Encountered graph break when attempting to trace"
_ENVIRONMENT = "TORCH_LOGS"
_TORCH = str(Path(torch.__file__).parent)


@dataclass(frozen=True)
class GraphBreak:
    """A place in a model where a graph ends early."""

    reason: str
    """In dynamo's words, without its hints."""
    hint: str
    """Its first hint; empty if it has none."""
    file: str
    """Of the line."""
    line: int
    """In the file."""
    times: int
    """How often compiling met it; a model with equal blocks meets it in the first of them."""

    def __str__(self) -> str:
        times = f" ({self.times} times)" if self.times > 1 else ""
        lines = [f"  {self.file}:{self.line}{times}"]
        if code := _code(self.file, self.line):
            lines.append(f"      {code}")
        lines.append(_wrapped(self.reason))
        if self.hint:
            lines.append(_wrapped(f"hint: {self.hint}"))
        return "\n".join(lines)


@dataclass(frozen=True)
class Recompilation:
    """A condition that made a compiled function be compiled again."""

    function: str
    """Its name."""
    file: str
    """Where it begins."""
    line: int
    """In the file."""
    guard: str
    """The condition of the last compiled version, which did not hold any more."""
    source: str
    """``file:line: code`` that the condition comes from; empty if dynamo does not say."""
    times: int
    """How often."""

    def __str__(self) -> str:
        times = f" ({self.times} times)" if self.times > 1 else ""
        lines = [f"  {self.file}:{self.line} {self.function}{times}"]
        lines.append(_wrapped(f"did not hold: {self.guard}"))
        if self.source:
            lines.append(f"      from {self.source}")
        return "\n".join(lines)


class CompileLog(logging.Handler):
    """Reads torch's logs of graph breaks and recompilations, which then reach nobody else."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self._breaks: Counter[tuple[str, str, str, int]] = Counter()
        self._recompilations: Counter[tuple[str, str, int, str, str]] = Counter()
        from torch._dynamo import utils as dynamo  # loads the loggers that are listened to

        self._stats = dynamo.counters["stats"]
        self._graphs_before = self._stats["unique_graphs"]
        _set_logs(is_on=True)
        self._loggers = [
            logging.getLogger(name)
            for name in list(logging.root.manager.loggerDict)
            if name.startswith("torch._dynamo.")
            and name.endswith(("__graph_breaks", "__recompiles"))
        ]
        self._propagated = [one.propagate for one in self._loggers]
        for one in self._loggers:
            one.propagate = False
            one.addHandler(self)

    @property
    def graphs(self) -> int:
        """Graphs that were compiled so far."""
        return int(self._stats["unique_graphs"] - self._graphs_before)

    @property
    def breaks(self) -> tuple[GraphBreak, ...]:
        """Breaks so far, those met most often first."""
        return tuple(GraphBreak(*what, times) for what, times in self._breaks.most_common())

    @property
    def recompilations(self) -> tuple[Recompilation, ...]:
        """Recompilations so far, those that happened most often first."""
        found = self._recompilations.most_common()
        return tuple(Recompilation(*what, times) for what, times in found)

    def emit(self, record: logging.LogRecord) -> None:
        """Take what is a break or a recompilation."""
        text = record.getMessage()
        if (place := _PLACE.search(text)) and (reason := _REASON.search(text)):
            told, hint = _told(reason["reason"])
            self._breaks[told, hint, place["file"], int(place["line"])] += 1
        elif function := _FUNCTION.search(text):
            file = function["file"]
            condition, source = _cause(text[function.end() :], file)
            what = _name(function["name"]), file, int(function["line"]), condition, source
            self._recompilations[what] += 1

    def close(self) -> None:
        """Listen no more; torch logs what it logs without this."""
        for one, propagates in zip(self._loggers, self._propagated, strict=True):
            one.removeHandler(self)
            one.propagate = propagates
        self._loggers, self._propagated = [], []
        _set_logs(is_on=False)
        super().close()


def _set_logs(*, is_on: bool) -> None:
    # torch ignores a call while the variable is set.
    given = os.environ.pop(_ENVIRONMENT, None)
    try:
        torch._logging.set_logs(graph_breaks=is_on, recompiles=is_on)
    finally:
        if given is not None:
            os.environ[_ENVIRONMENT] = given


def _told(reason: str) -> tuple[str, str]:
    """The reason in one line, and the first hint."""
    lines = [line.strip() for line in reason.strip().splitlines()]
    hint = next((line.removeprefix("Hint: ") for line in lines if line.startswith("Hint:")), "")
    explanation = [line for line in lines if line.startswith("Explanation: ")]
    plain = [line for line in lines if line and not line.startswith(_PREAMBLE)]
    first = plain[0] if plain else reason.strip()
    told = first.rstrip(".")
    if explanation:
        told = f"{told}. {explanation[0].removeprefix('Explanation: ')}"
    return told, hint


def _name(function: str) -> str:
    """A function's name; what dynamo makes of the rest of one, behind a break, in words."""
    resumed = _RESUMED.fullmatch(function)
    return f"{resumed['name']} after line {resumed['line']}" if resumed else function


def _cause(text: str, file: str) -> tuple[str, str]:
    """The condition of the compiled version that was tried first, and where it comes from.

    Args:
        text: what follows the first line of a message.
        file: of the function. In comments dynamo cuts off the beginning of some paths.
    """
    first = _GUARD.search(text) or _PLAIN_GUARD.search(text)
    if first is None:
        return "unknown", ""
    following = _GUARD.search(text, first.end())
    frames = list(_FRAME.finditer(text, first.end(), following.start() if following else len(text)))
    own = [one for one in frames if not one["file"].startswith(_TORCH)]
    comment = _SOURCE.search(first["guard"])
    if comment is None:
        return first["guard"].strip(), ""
    condition = first["guard"][: comment.start()].strip()
    if own:
        path, line = own[-1]["file"], int(own[-1]["line"])
        return condition, f"{path}:{line}: {_code(path, line) or comment['code']}"
    path = file if file.endswith(comment["file"]) else comment["file"]
    return condition, f"{path}:{comment['line']}: {comment['code']}"


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 96, initial_indent=" " * 6, subsequent_indent=" " * 8)


def _code(file: str, line: int) -> str:
    return linecache.getline(file, line).strip()
