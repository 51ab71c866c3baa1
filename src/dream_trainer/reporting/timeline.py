"""``timeline.jsonl``: what the clock saw of a run, read whatever a kill has left of it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Moment:
    """One line: something happened."""

    time: float
    """Seconds since 1970, by the clock of the host that wrote it."""
    event: str
    """``"start"``, ``"progress"``, ``"checkpoint"``, ``"validation"`` or ``"end"``."""
    step: int
    """Optimizer steps done."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """All that the line says."""


def read_timeline(path: Path) -> tuple[list[Moment], list[str]]:
    """All whole lines, in the order of the file.

    Half a line is what a kill leaves: it is passed over at the end and before a start, and a
    problem elsewhere.

    Returns:
        Moments and problems; both are empty if there is no file.
    """
    moments: list[Moment] = []
    problems: list[str] = []
    if not path.exists():
        return moments, problems
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        return moments, [f"{path.name}: {error}"]
    unread: list[str] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            moment = _moment(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):  # the last one is being written, or was cut short
                unread.append(f"{path.name}, line {number}: {error}")
            continue
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            problems.append(f"{path.name}, line {number}: {error!r}")
            continue
        if moment.event != "start":
            problems += unread
        unread = []
        moments.append(moment)
    return moments, problems + unread[:-1]


def _moment(line: Any) -> Moment:
    told = {name: line[name] for name in ("began", "stall", "took") if line.get(name) is not None}
    if line["event"] == "progress":
        told |= line["seconds"]
    time = float(line["time"])
    wrong = [name for name, one in [("time", time), *told.items()] if not math.isfinite(one)]
    if wrong:
        raise ValueError(f"{', '.join(wrong)} is not finite")
    return Moment(time, str(line["event"]), int(line["step"]), line)
