"""Timelines by hand, in the words of their file, and a real run with one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from support import tiny

Line = dict[str, Any]
MEASURED = {"samples_per_second": 100.0, "memory/process_gib": 0.5, "loader_wait": 0.1}


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


def killed_run(root: Path) -> Path:
    """A run of 12 steps that looks as if it had been killed at step 9, and went on at 6."""
    trainer = tiny(root, n_epochs=2, monitor="val/loss", callbacks={}, async_save=False)
    trainer.fit()
    run = Path(trainer.run_directory)
    write(
        run / "timeline.jsonl",
        start(1_800_000_002, began=1_800_000_000, host="node-1", device="cpu"),
        progress(1_800_000_008, 5, MEASURED, train=5, loader=1),
        validation(1_800_000_010, 6, took=1),
        checkpoint(1_800_000_011, 6, stall=0.5),
        progress(1_800_000_013, 9, MEASURED, train=8, loader=1, validation=1, save=0.5),
        start(1_800_000_032, 6, began=1_800_000_030),
        progress(1_800_000_038, 12, MEASURED, train=6),
        end(1_800_000_038, 12),
    )
    return run
