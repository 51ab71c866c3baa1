"""``report``: what runs were, how they ended, and how several compare."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dream_trainer.cli.tables import (
    counted,
    moment,
    number,
    print_heading,
    print_table,
    until_nobody_reads,
)

if TYPE_CHECKING:
    from dream_trainer.checkpointing.inventory import RunFolder
    from dream_trainer.reporting import MetricSummary, RunReport

_HELP = "tell what runs were: configuration, metrics, checkpoints; several are compared"
#: More columns than these are no table any more.
_MOST_SIDE_BY_SIDE = 6


def add_report_command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], prog: str
) -> None:
    """Add the parser of ``report`` to those of the other commands."""
    parser = commands.add_parser(
        "report", prog=f"{prog} report", help=_HELP, description=_HELP, allow_abbrev=False
    )
    parser.add_argument(
        "places", metavar="RUN", nargs="+", help="a run's directory, or a directory of runs"
    )
    parser.add_argument("--json", action="store_true", help="plain data for programs")


def report(given: argparse.Namespace) -> None:
    """Run what the parser of ``report`` read.

    Raises:
        ConfigError: a path leads to no run.
    """
    # Here, because `--help` needs none of it.
    from dream_trainer.checkpointing.places import find_runs
    from dream_trainer.reporting import report_run

    runs = [run for place in given.places for run in find_runs(Path(place))]
    reports = [report_run(run) for run in runs]
    if given.json:
        with until_nobody_reads():
            print(json.dumps([one.as_dict() for one in reports], indent=2, default=str))
        return
    with until_nobody_reads():
        for run, one in zip(runs, reports, strict=True):
            _print_run(run, one)
            print()
        if len(reports) > 1:
            _print_comparison(reports)


def _print_run(run: RunFolder, report: RunReport) -> None:
    from dream_trainer.cli.checkpoint_listing import print_checkpoints

    print_heading(str(report.directory))
    print(
        f"{counted(report.step, 'step')}, {counted(report.epoch, 'epoch')} completed; written "
        f"{moment(report.first_written)} to {moment(report.last_written)} UTC"
    )
    for problem in report.problems:
        print(f"not read: {problem}")
    for change in report.config_changes:
        values = [f"{k} {_told(a)} -> {_told(b)}" for k, (a, b) in change.values.items()]
        print(f"started again with another configuration: {', '.join(values) or 'its text'}")
    for name in report.logs_set_aside:
        print(f"log begun anew; the earlier one is {name}")
    if report.metrics:
        print()
        _print_metrics(report)
    print()
    print_checkpoints(run, report.checkpoints)


def _print_metrics(report: RunReport) -> None:
    columns = ("Metric", "Last", "Step", "Lowest", "Step ", "Highest", "Step  ")
    rows = [
        (name, *_cells(one.last), *_cells(one.lowest), *_cells(one.highest))
        for name, one in sorted(report.metrics.items())
    ]
    print_table(columns, rows, columns[1:])
    monitored = report.metrics.get(report.monitor or "")
    if monitored is not None and (best := monitored.best(str(report.mode))):
        value, step = best
        print(f"best {report.monitor} ({report.mode}): {number(value)} at step {step}")


def _cells(point: tuple[float, int] | None) -> tuple[str, str]:
    return (number(point[0]), str(point[1])) if point else ("-", "-")


def _print_comparison(reports: Sequence[RunReport]) -> None:
    shown = reports[:_MOST_SIDE_BY_SIDE]
    if len(reports) > len(shown):
        print(f"The first {len(shown)} of {len(reports)} side by side; --json has all.")
    names = _short_names([one.directory for one in shown])
    _print_configs(shown, names)
    print_heading("Metrics")
    rows = []
    for metric in sorted({name for one in shown for name in one.metrics}):
        summaries = [one.metrics.get(metric) for one in shown]
        for which in ("last", "lowest", "highest"):
            label = metric if which == "last" else ""
            rows.append((label, which, *(_at(one, which) for one in summaries)))
    print_table(("Metric", "Value", *names), rows, names)


def _print_configs(shown: Sequence[RunReport], names: Sequence[str]) -> None:
    from dream_trainer.configs.differing import differing

    without = [n for n, one in zip(names, shown, strict=True) if one.config is None]
    if without:
        print(f"Configurations are not compared: there is none of {', '.join(without)}.\n")
        return
    found = differing([one.config for one in shown])
    print_heading(f"Configuration: {counted(len(found), 'difference')}")
    if found:
        rows = [(name, *map(_told, values)) for name, values in found.items()]
        print_table(("Name", *names), rows)
    print()


def _at(summary: MetricSummary | None, which: str) -> str:
    point = getattr(summary, which, None)
    return f"{number(point[0])} at {point[1]}" if point else "-"


def _short_names(directories: Sequence[Path]) -> list[str]:
    """Paths below the deepest directory that they share."""
    whole = [str(path.absolute()) for path in directories]
    shared = os.path.commonpath(whole)
    return [os.path.relpath(path, shared) for path in whole]


def _told(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
