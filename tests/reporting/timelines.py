"""Timelines by hand, in the words of their file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Line = dict[str, Any]


def start(time: float, step: int = 0, *, began: float | None = None, **told: Any) -> Line:
    began = time if began is None else began
    resumed = f"step-{step:08d}" if step else None
    return _line("start", time, step, began=began, **{"resumed_from": resumed, "ranks": 1} | told)


def progress(time: float, step: int, measured: Line | None = None, **seconds: float) -> Line:
    return _line(
        "progress", time, step, seconds=seconds, batches=step, samples=step, measured=measured or {}
    )


def checkpoint(time: float, step: int, stall: float = 0.0) -> Line:
    return _line("checkpoint", time, step, name=f"step-{step:08d}", stall=stall)


def validation(time: float, step: int, took: float) -> Line:
    return _line("validation", time, step, took=took)


def end(time: float, step: int, status: str = "done", reason: str | None = None) -> Line:
    return _line("end", time, step, status=status, reason=reason)


def _line(event: str, time: float, step: int, **told: Any) -> Line:
    return {"time": time, "event": event, "step": step, "epoch": 0, **told}


def write(path: Path, *lines: Line | str) -> Path:
    """Lines of a file; text is written as it is, without an end of line."""
    texts = [one if isinstance(one, str) else json.dumps(one) + "\n" for one in lines]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(texts))
    return path
