"""A run as its directory tells of it: when, how far, how it was configured, what was measured."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from dream_trainer.checkpointing.inventory import ListedCheckpoint, RunFolder, read_config
from dream_trainer.configs.differing import ABSENT, differing
from dream_trainer.loggers import LOG_NAME, TIMELINE_NAME, JsonlLog
from dream_trainer.reporting.curves import CurveCollector
from dream_trainer.reporting.goodput import Goodput, measure_goodput
from dream_trainer.reporting.timeline import read_timeline

_SUPERSEDED = re.compile(r".*\.superseded-(\d+)")
_PLACE = ("step", "epoch")

#: A value and the optimizer step that it was logged at.
Point = tuple[float, int]


@dataclass
class MetricSummary:
    """One metric over a run. NaN is neither the lowest nor the highest value."""

    num_values: int
    last: Point
    lowest: Point | None = None
    highest: Point | None = None

    def best(self, mode: str) -> Point | None:
        """The lowest for ``"min"``, the highest for ``"max"``; the first of equal ones."""
        return self.lowest if mode == "min" else self.highest

    def add(self, value: float, step: int) -> None:
        """Take one more value into account."""
        self.num_values += 1
        self.last = point = (value, step)
        if self.lowest is None or self.highest is None:
            if value == value:
                self.lowest = self.highest = point
        elif value < self.lowest[0]:
            self.lowest = point
        elif value > self.highest[0]:
            self.highest = point


@dataclass(frozen=True)
class ConfigChange:
    """A start of the run with another configuration than before."""

    file: str
    """Where the configuration before is."""
    values: Mapping[str, Sequence[Any]]
    """Dotted name -> value before and after."""


@dataclass(frozen=True)
class RunReport:
    """What is known of a run.

    Without a timeline a restart that changed nothing has left no trace, as it is exact.
    """

    directory: Path
    first_written: str | None
    """When the oldest file that is left was written, in UTC (ISO 8601)."""
    last_written: str | None
    """When the newest was."""
    step: int
    """Optimizer steps, from the log or the newest checkpoint."""
    epoch: int
    """Epochs completed, as far as these tell."""
    num_rows: int
    """Rows of the log."""
    metrics: Mapping[str, MetricSummary]
    monitor: str | None
    mode: str | None
    config: Mapping[str, Any] | None
    config_changes: Sequence[ConfigChange]
    """Oldest first."""
    logs_set_aside: Sequence[str]
    """Logs of earlier starts from the beginning, and logs that were edited."""
    checkpoints: Sequence[ListedCheckpoint]
    problems: Sequence[str]
    """What could not be read."""
    goodput: Goodput | None = None
    """Where the time went, and every start; None without a timeline."""

    def as_dict(self) -> dict[str, Any]:
        """Plain data for programs; values that are not finite are words, as in the log."""
        return {
            "directory": str(self.directory),
            "first_written": self.first_written,
            "last_written": self.last_written,
            "step": self.step,
            "epoch": self.epoch,
            "rows": self.num_rows,
            "monitor": self.monitor,
            "mode": self.mode,
            "metrics": {name: _plain_metric(one) for name, one in self.metrics.items()},
            "config": self.config,
            "config_changes": [
                {"file": one.file, "values": {k: _plain(v) for k, v in one.values.items()}}
                for one in self.config_changes
            ],
            "logs_set_aside": list(self.logs_set_aside),
            "checkpoints": [one.as_dict() for one in self.checkpoints],
            "problems": list(self.problems),
            "goodput": self.goodput and self.goodput.as_dict(),
        }


def report_run(run: RunFolder, curves: CurveCollector | None = None) -> RunReport:
    """Read all that a run's directory tells; nothing is written, and the run may go on.

    Args:
        run: where it is.
        curves: gets every value of the log, for those who draw it.
    """
    log = JsonlLog(run.directory / LOG_NAME)
    moments, problems = read_timeline(run.directory / TIMELINE_NAME)
    metrics: dict[str, MetricSummary] = {}
    num_rows = step = epoch = 0
    try:
        for row in log.rows():
            num_rows, step, epoch = num_rows + 1, int(row["step"]), int(row["epoch"])
            _add(metrics, row, step, curves)
    except OSError as error:
        problems.append(f"{LOG_NAME}: {error}")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        problems.append(f"{LOG_NAME}, line {num_rows + 1}: {error}")
    listed = run.checkpoints()
    newest = next((one.manifest for one in reversed(listed) if one.manifest), None)
    old_configs, old_logs = (_superseded(run.directory, n) for n in ("config.yaml", LOG_NAME))
    first, last = _written([run.directory / LOG_NAME, *_configs(run), *old_configs], listed)
    rules = run.recorded
    return RunReport(
        directory=run.directory,
        first_written=first,
        last_written=last,
        step=max(step, newest.step if newest else 0),
        epoch=max(epoch, newest.epoch if newest else 0),
        num_rows=num_rows,
        metrics=metrics,
        monitor=rules.monitor if rules else None,
        mode=rules.mode if rules else None,
        config=run.config,
        config_changes=list(_changes([*old_configs, *_configs(run)])),
        logs_set_aside=[path.name for path in old_logs],
        checkpoints=listed,
        problems=problems,
        goodput=measure_goodput(moments),
    )


def _add(
    metrics: dict[str, MetricSummary],
    row: Mapping[str, float],
    step: int,
    curves: CurveCollector | None,
) -> None:
    for name, value in row.items():
        if name in _PLACE:
            continue
        if name not in metrics:
            metrics[name] = MetricSummary(0, (value, step))
        metrics[name].add(value, step)
        if curves is not None:
            curves.add(name, value, step)


def _configs(run: RunFolder) -> list[Path]:
    path = run.directory / "config.yaml"
    return [path] if path.exists() else []


def _superseded(directory: Path, name: str) -> list[Path]:
    """Earlier files of a name, oldest first."""
    found = [
        (int(match[1]), path)
        for path in directory.glob(f"{name}.superseded-*")
        if (match := _SUPERSEDED.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found)]


def _changes(files: Sequence[Path]) -> Iterator[ConfigChange]:
    for before, after in itertools.pairwise(files):
        configs = [read_config(path) for path in (before, after)]
        if None not in configs:
            yield ConfigChange(before.name, differing(configs))


def _written(files: Iterable[Path], listed: Iterable[ListedCheckpoint]) -> tuple[Any, Any]:
    """The first and the last moment that something of a run was written."""
    moments = [one.manifest.saved_at for one in listed if one.manifest and one.manifest.saved_at]
    for path in files:
        if path.exists():
            written = datetime.fromtimestamp(path.stat().st_mtime, timezone.utc)
            moments.append(written.isoformat(timespec="seconds"))
    return (min(moments), max(moments)) if moments else (None, None)


def _plain_metric(metric: MetricSummary) -> dict[str, Any]:
    points = {"last": metric.last, "lowest": metric.lowest, "highest": metric.highest}
    return {"values": metric.num_values} | {
        name: point and {"value": _word(point[0]), "step": point[1]}
        for name, point in points.items()
    }


def _word(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _plain(values: Iterable[Any]) -> list[Any]:
    return [None if value is ABSENT else value for value in values]
