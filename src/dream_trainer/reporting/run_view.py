"""A run as it is drawn: its report, its curves, and what is marked on their axis."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dream_trainer.checkpointing.inventory import RunFolder
from dream_trainer.checkpointing.places import find_runs
from dream_trainer.reporting.curves import (
    Chart,
    Curve,
    CurveCollector,
    arrange,
    measured_curves,
    step_clock,
)
from dream_trainer.reporting.run_report import RunReport, report_run


@dataclass(frozen=True)
class Mark:
    """A place on the axis."""

    step: float
    seconds: float | None
    """Since the run began; None if nothing tells."""
    text: str


@dataclass(frozen=True)
class RunView:
    """All that is drawn of one run."""

    label: str
    report: RunReport
    logged: Mapping[str, Curve]
    measured: Mapping[str, Curve]
    """Of the timeline: throughput, memory, share of waiting."""
    restarts: Sequence[Mark]
    checkpoints: Sequence[tuple[Mark, Sequence[str]]]
    """Those that are there, and why they stay."""
    best: tuple[Mark, float] | None
    """The best value of what the run monitors."""


def view_runs(runs: Sequence[RunFolder], most: int | None) -> list[RunView]:
    """Read runs, with labels that tell them apart.

    Args:
        runs: of any number.
        most: points that a curve may have; None for all.
    """
    labels = short_names([run.directory for run in runs])
    return [_view(run, label, most) for run, label in zip(runs, labels, strict=True)]


def view_directories(directories: Sequence[str | Path], most: int | None) -> list[RunView]:
    """The same for paths: a run, or a directory of runs.

    Raises:
        ConfigError: a path leads to no run.
    """
    return view_runs([run for place in directories for run in find_runs(Path(place))], most)


def _view(run: RunFolder, label: str, most: int | None) -> RunView:
    # Here, because the command line is read without it.
    import numpy as np

    collector = CurveCollector()
    report = report_run(run, collector)
    goodput = report.goodput
    clock = step_clock(goodput)

    def mark(step: int, text: str) -> Mark:
        return Mark(step, None if clock is None else float(np.interp(step, *clock)), text)

    checkpoints = [
        (mark(one.step, ", ".join([one.path.name, *one.kinds])), one.kinds)
        for one in report.checkpoints
        if one.step is not None
    ]
    monitored = report.metrics.get(report.monitor or "")
    best = monitored and monitored.best(str(report.mode))
    text = f"best {report.monitor}: {best[0]:.6g} at step {best[1]:,}" if best else ""
    return RunView(
        label,
        report,
        collector.curves(most, goodput),
        measured_curves(goodput, most),
        _restarts(report),
        checkpoints,
        (mark(best[1], text), best[0]) if best else None,
    )


def _restarts(report: RunReport) -> list[Mark]:
    if report.goodput is None:
        return []
    first, *later = report.goodput.attempts
    return [
        Mark(
            one.first_step,
            one.started - first.began,
            f"start {number}, from {one.resumed_from or 'the beginning'}",
        )
        for number, one in enumerate(later, start=2)
    ]


def charts_of(names: Sequence[Mapping[str, Curve]], wanted: Sequence[str] = ()) -> list[Chart]:
    """The charts of several runs.

    Args:
        names: the curves of each run.
        wanted: these alone, all if it is empty.
    """
    found = dict.fromkeys(name for curves in names for name in curves)
    return arrange(name for name in found if not wanted or name in wanted)


def short_names(directories: Sequence[Path]) -> list[str]:
    """Names of runs: paths below the deepest directory that they share."""
    if len(directories) == 1:
        return [directories[0].absolute().name]
    whole = [str(path.absolute()) for path in directories]
    shared = os.path.commonpath(whole)
    return [os.path.relpath(path, shared) for path in whole]
