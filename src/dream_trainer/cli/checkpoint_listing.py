"""``checkpoints ls`` and ``verify``: which checkpoints there are, and whether they are whole."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from dream_trainer.checkpointing.inventory import ListedCheckpoint, RunFolder
from dream_trainer.checkpointing.places import find_runs
from dream_trainer.cli.tables import moment, number, print_heading, print_table
from dream_trainer.errors import ConfigError
from dream_trainer.storage.sizes import size
from dream_trainer.words import counted

_NUMBERS = ("Epoch", "Size", "Ranks")


def ls(given: argparse.Namespace) -> None:
    """List the checkpoints of runs."""
    runs = [run for place in given.places for run in find_runs(Path(place))]
    if given.json:
        rows = [
            {"run": str(run.directory), **one.as_dict()}
            for run in runs
            for one in run.checkpoints()
        ]
        print(json.dumps(rows, indent=2))
        return
    for index, run in enumerate(runs):
        if index:
            print()
        print_heading(str(run.directory))
        print_checkpoints(run, run.checkpoints())


def print_checkpoints(run: RunFolder, listed: Sequence[ListedCheckpoint]) -> None:
    """Print the checkpoints of a run."""
    if listed:
        monitors = dict.fromkeys(
            one.manifest.monitor for one in listed if one.manifest and one.manifest.monitor
        )
        monitored = " or ".join(monitors) or "Monitored"
        columns = ("Checkpoint", *_NUMBERS, "Saved (UTC)", monitored, "Kept as", "State")
        rows = [_row(one) for one in listed]
        print_table(columns, rows, (*_NUMBERS, monitored))
    total = sum(one.manifest.num_bytes for one in listed if one.manifest)
    print(f"{counted(len(listed), 'checkpoint')}, {size(total)}")
    for path in run.set_aside():
        print(f"set aside: {path.name}, {size(_size_on_disk(path))}")


def _row(one: ListedCheckpoint) -> tuple[str, ...]:
    state = "whole" if one.is_whole else f"damaged: {'; '.join(one.problems)}"
    found = one.manifest
    if found is None:
        return (one.path.name, "-", "-", "-", "-", "-", "", state)
    return (
        one.path.name,
        str(found.epoch),
        size(found.num_bytes),
        str(found.world_size),
        moment(found.saved_at),
        number(found.monitored),
        ", ".join(one.kinds),
        state,
    )


def _size_on_disk(path: Path) -> int:
    return sum(one.stat().st_size for one in path.rglob("*") if one.is_file())


def verify(given: argparse.Namespace) -> int:
    """Read every file of checkpoints and compare it with the manifest.

    Returns:
        0 if all are whole, 1 if not.
    """
    runs = [run for place in given.places for run in find_runs(Path(place))]
    listed = [(run, one) for run in runs for one in run.checkpoints()]
    if not listed:
        raise ConfigError(", ".join(given.places), ["there is no checkpoint"])
    total = sum(one.manifest.num_bytes for _, one in listed if one.manifest)
    damaged: list[tuple[RunFolder, ListedCheckpoint]] = []
    whole: list[tuple[RunFolder, ListedCheckpoint]] = []
    with _progress(total) as advance:
        for run, one in listed:
            problems = one.problems
            if one.manifest is not None:
                problems = one.manifest.problems(one.path, advance=advance)
            if problems and not one.path.exists():
                print(f"{one.path}: deleted meanwhile, by its run")
                continue
            (damaged if problems else whole).append((run, one))
            print(f"{one.path}: {'damaged' if problems else 'whole'}")
            for problem in problems:
                print(f"  {problem}")
    read = sum(one.manifest.num_bytes for _, one in whole if one.manifest)
    print(f"{len(whole)} whole ({size(read)}), {len(damaged)} damaged")
    for run in dict.fromkeys(run for run, _ in damaged):
        print(_next_move(run, [one.path for where, one in whole if where is run]))
    return 1 if damaged else 0


def _next_move(run: RunFolder, whole: Sequence[Path]) -> str:
    if run.only is not None:
        return f"'checkpoints verify {run.directory}' looks for a whole one of the same run."
    if whole:
        return (
            f"{run.directory}: a run that resumes passes over the damaged ones; {whole[-1].name} "
            "is the newest whole one."
        )
    return f"{run.directory}: none is whole. Restore one from a copy, or move the run away."


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[int], object]]:
    """A bar on a terminal; gives what is to be called with the bytes just read."""
    if not sys.stderr.isatty() or not sys.stdout.isatty():
        yield bool
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

    columns = (BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn())
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task("verify", total=total)
        yield lambda number: bar.advance(task, number)
