"""From a path that somebody typed to the runs and checkpoints that are there."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from dream_trainer.checkpointing.inventory import ListedCheckpoint, RunFolder
from dream_trainer.checkpointing.store import CheckpointStore
from dream_trainer.errors import ConfigError

_STEP = re.compile(r"step-\d+")
_MOST_NAMES = 8


def find_runs(place: Path) -> list[RunFolder]:
    """The run at a path, or all runs below it, in the order of their names.

    Args:
        place: a checkpoint, a run's directory, its ``checkpoints``, or a directory of runs.

    Raises:
        ConfigError: there is nothing of that kind.
    """
    if place.is_symlink() and place.name in ("newest", "best"):
        place = place.parent / place.readlink()
    if not place.exists():
        raise missing(place)
    if (run := _run_at(place)) is not None:
        return [run]
    found = list(_runs_below(place))
    if not found:
        raise ConfigError(
            str(place),
            [f"there is no run and no checkpoint here or below; here is: {_names(place)}"],
            "Give a run's directory, a checkpoint, or a directory of runs.",
        )
    return found


def find_checkpoint(place: Path) -> ListedCheckpoint:
    """The checkpoint at a path, or the newest whole one of the run there.

    Raises:
        ConfigError: there are several runs, or none.
        CheckpointError: the run has no whole checkpoint.
    """
    runs = find_runs(place)
    if len(runs) > 1:
        raise ConfigError(
            str(place),
            [f"{len(runs)} runs are below it"],
            f"Give one of them, {runs[0].directory} for example.",
        )
    if runs[0].only is not None:
        return runs[0].checkpoints()[0]
    return runs[0].newest_whole()


def run_of(checkpoint: Path) -> RunFolder:
    """The run that a checkpoint lies in, looking at that checkpoint alone."""
    home = checkpoint.parent
    directory = home.parent if home.name == "checkpoints" else home
    return RunFolder(directory, CheckpointStore(home), only=checkpoint)


def missing(place: Path) -> ConfigError:
    """The error for a path that leads nowhere; it names what is near."""
    there = place.parent
    while not there.is_dir() and there != there.parent:
        there = there.parent
    wrong = place.relative_to(there).parts[0]
    names = sorted(path.name for path in there.iterdir() if not path.name.startswith("."))
    near = difflib.get_close_matches(wrong, names, n=3)
    told = f"did you mean {there / near[0]}?" if near else f"in {there} is: {_names(there)}"
    return ConfigError(str(place), [f"there is nothing of that name; {told}"])


def _names(directory: Path) -> str:
    if not directory.is_dir():
        return "a file"
    names = sorted(path.name for path in directory.iterdir() if not path.name.startswith("."))
    more = f", and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return (", ".join(names[:_MOST_NAMES]) or "nothing") + more


def _run_at(place: Path) -> RunFolder | None:
    if (place / "manifest.json").exists() or _STEP.match(place.name):
        return run_of(place)
    if place.name == "checkpoints" and (place.parent / "config.yaml").exists():
        place = place.parent
    inside = CheckpointStore(place / "checkpoints")
    if inside.paths() or (place / "config.yaml").exists() or (place / "metrics.jsonl").exists():
        return RunFolder(place, inside)
    if (own := CheckpointStore(place)).paths():
        return RunFolder(place.parent if place.name == "checkpoints" else place, own)
    return None


def _runs_below(place: Path) -> Iterator[RunFolder]:
    try:
        with os.scandir(place) as entries:
            # Links are not followed: they may lead back up.
            below = sorted(
                entry.name
                for entry in entries
                if entry.is_dir(follow_symlinks=False) and not entry.name.startswith(".")
            )
    except OSError:  # a file, or somebody else's directory
        return
    for name in below:
        run = _run_at(place / name)
        if run is None:
            yield from _runs_below(place / name)
        elif run.only is None:
            yield run
