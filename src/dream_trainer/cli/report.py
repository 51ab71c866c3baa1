"""``report``: what runs were, how they ended, and how several compare."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dream_trainer.cli.tables import (
    moment,
    number,
    print_heading,
    print_table,
    until_nobody_reads,
)
from dream_trainer.errors import ConfigError
from dream_trainer.words import counted, duration, percent

if TYPE_CHECKING:
    from dream_trainer.checkpointing.inventory import RunFolder
    from dream_trainer.reporting import Goodput, MetricSummary, RunReport
    from dream_trainer.reporting.run_view import RunView

_HELP = (
    "tell what runs were: metrics, time, configuration, checkpoints; in words, and as an HTML "
    "file with curves; several are compared"
)
#: More columns than these are no table any more.
_MOST_SIDE_BY_SIDE = 6
#: Parts of the wall time that are worth a word.
_LEAST_SHARE = 0.005
_KINDS = ("png", "pdf", "svg")


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
    parser.add_argument(
        "--json", action="store_true", help="plain data for programs, instead of words and HTML"
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="where the HTML goes: by default report.html in the directory of the run, or here for "
        "several runs",
    )
    parser.add_argument("--no-html", action="store_true", help="words only")
    for kind in ("png", "pdf", "svg"):
        parser.add_argument(
            f"--{kind}", metavar="FOLDER", help=f"the curves as {kind.upper()} files for a paper"
        )
    parser.add_argument("--log", action="store_true", help="logarithmic values in those files")


def report(given: argparse.Namespace) -> None:
    """Run what the parser of ``report`` read.

    Raises:
        ConfigError: a path leads to no run, or a file cannot be written.
    """
    # Here, because `--help` needs none of it.
    from dream_trainer.checkpointing.places import find_runs
    from dream_trainer.reporting import report_run
    from dream_trainer.reporting.figures import save_figures
    from dream_trainer.reporting.page import MOST_POINTS
    from dream_trainer.reporting.run_view import view_runs

    if given.no_html and given.output:
        raise ConfigError("--output", ["it is where the HTML goes"], "Leave out --no-html.")
    runs = [run for place in given.places for run in find_runs(Path(place))]
    folders = {kind: Path(folder) for kind in _KINDS if (folder := getattr(given, kind))}
    wants_html = bool(given.output) or not (given.json or given.no_html)
    views = view_runs(runs, MOST_POINTS) if wants_html or folders else None
    reports = [report_run(run) for run in runs] if views is None else [v.report for v in views]
    # Files first: whoever reads the words may go before their end.
    files: list[str] = []
    try:
        for kind, folder in folders.items():
            files += map(str, save_figures(views or [], folder, kind, log=given.log))
        if wants_html:
            files.append(_write_page(views or [], given.output))
    finally:
        with until_nobody_reads():
            if given.json:
                print(json.dumps([one.as_dict() for one in reports], indent=2, default=str))
            else:
                _print_all(runs, reports)
                for path in files:
                    print(path)


def _write_page(views: Sequence[RunView], output: str | None) -> str:
    """Write the HTML, and say where it is."""
    from dream_trainer.reporting.page import has_plotly, write_page

    if not output and not has_plotly():
        return "no report.html: pip install 'dream-trainer[report]' brings what it needs"
    home = views[0].report.directory if len(views) == 1 else Path()
    path = Path(output) if output else home / "report.html"
    try:
        write_page(views, path)
    except OSError as error:
        problem = error.strerror or str(error)
        raise ConfigError(str(path), [problem], "Choose another --output, or --no-html.") from error
    return str(path)


def _print_all(runs: Sequence[RunFolder], reports: Sequence[RunReport]) -> None:
    for run, one in zip(runs, reports, strict=True):
        _print_run(run, one)
        print()
    if len(reports) > 1:
        _print_comparison(reports)
        print()


def _print_run(run: RunFolder, report: RunReport) -> None:
    from dream_trainer.cli.checkpoint_listing import print_checkpoints

    print_heading(str(report.directory))
    print(
        f"{counted(report.step, 'step')}, {counted(report.epoch, 'epoch')} completed; written "
        f"{moment(report.first_written)} to {moment(report.last_written)} UTC"
    )
    if report.goodput is not None:
        _print_goodput(report.goodput)
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


def _print_goodput(goodput: Goodput) -> None:
    wall = goodput.wall or 1.0
    parts = sorted(goodput.parts.items(), key=lambda part: -part[1])
    told = [
        f"{name.replace('_', '-')} {percent(seconds / wall)}"
        for name, seconds in parts
        if seconds >= _LEAST_SHARE * wall and name != "training"
    ]
    rest = f"; {', '.join(told)}" if told else ""
    print(f"goodput {percent(goodput.share)} of {duration(goodput.wall)}{rest}")
    if goodput.restarts:
        again = counted(goodput.lost_steps, "step")
        print(f"{counted(goodput.restarts, 'restart')}; {again} done again")
    last = goodput.attempts[-1]
    if last.status not in (None, "done"):
        print(f"{last.status}: {last.reason}" if last.reason else last.status)


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
    from dream_trainer.reporting.run_view import short_names

    shown = reports[:_MOST_SIDE_BY_SIDE]
    if len(reports) > len(shown):
        print(f"The first {len(shown)} of {len(reports)} side by side; --json has all.")
    names = short_names([one.directory for one in shown])
    _print_configs(shown, names)
    print_heading("Metrics")
    rows = []
    if any(one.goodput for one in shown):
        told = [percent(one.goodput.share) if one.goodput else "-" for one in shown]
        rows.append(("goodput", "", *told))
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


def _told(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
