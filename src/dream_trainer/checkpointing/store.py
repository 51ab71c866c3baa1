"""The directory of a run's checkpoints: list, newest, best, prune."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dream_trainer.configs import CheckpointParameters
from dream_trainer.errors import CheckpointError
from dream_trainer.storage import Manifest, move_aside

# The second number tells apart checkpoints of one step: at the end of an epoch the state
# differs from the one after the epoch's last step.
_NAME = re.compile(r"step-(\d{8,})(?:-(\d+))?")
_LEFTOVER = re.compile(r"\.(step-.*|newest|best)\.tmp")


@dataclass(frozen=True)
class StoredCheckpoint:
    """A checkpoint on disk and what its manifest says."""

    path: Path
    manifest: Manifest


class CheckpointStore:
    """Checkpoints in one directory. Call on rank 0 only; nothing here communicates.

    Args:
        directory: need not exist yet.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def paths(self) -> list[Path]:
        """Every directory named like a checkpoint, oldest first, whole or not."""
        if not self.directory.is_dir():
            return []
        found = [(m, path) for path in self.directory.iterdir() if (m := _match(path))]
        return [path for _, path in sorted(found)]

    def list(self) -> list[StoredCheckpoint]:
        """Checkpoints with a readable manifest, oldest first."""
        stored = []
        for path in self.paths():
            try:
                stored.append(StoredCheckpoint(path, Manifest.read(path)))
            except CheckpointError:
                continue
        return stored

    def newest(self) -> StoredCheckpoint | None:
        """The last one of `list`."""
        return next(reversed(self.list()), None)

    def best(self, mode: str, monitor: str | None = None) -> StoredCheckpoint | None:
        """The one with the best monitored value; the newer of two equal ones."""
        return next(iter(best_first(self.list(), mode, monitor)), None)

    def path_for(self, step: int) -> Path:
        """A name for a checkpoint at a step, after all that are there of the same step."""
        name = f"step-{step:08d}"
        # Not the first free one: a deleted name, used again, would count as older than it is.
        revisions = [m[1] for path in self.paths() if (m := _match(path)) and m[0] == step]
        return self.directory / (f"{name}-{max(revisions) + 1}" if revisions else name)

    def prune(self, parameters: CheckpointParameters) -> Sequence[Path]:
        """Set the links, and delete what the rules do not keep.

        Returns:
            The deleted paths.
        """
        everything = self.list()
        self._link_all(everything, parameters)
        deleted = [one.path for one in superfluous(everything, parameters)]
        self.delete(deleted)
        return deleted

    def delete(self, paths: Iterable[Path]) -> None:
        """Delete checkpoints."""
        for path in paths:
            _delete(path)

    def link(self, parameters: CheckpointParameters) -> None:
        """Point the links ``newest`` and ``best`` to those checkpoints."""
        self._link_all(self.list(), parameters)

    def clean(self) -> None:
        """Delete what saves that were killed have left behind."""
        if not self.directory.is_dir():
            return
        for path in self.directory.iterdir():
            if not _LEFTOVER.fullmatch(path.name):
                continue
            if path.is_symlink():
                path.unlink()
            else:
                shutil.rmtree(path)

    def set_aside(self, path: Path, reason: str) -> Path:
        """Rename a checkpoint so that it is no longer one; nothing is deleted."""
        return move_aside(path, reason)

    def set_aside_after(self, path: Path) -> Sequence[Path]:
        """Rename the checkpoints that come after one: the run takes another course from it.

        One from elsewhere belongs to another course than all that are here.

        Returns:
            Their paths before, oldest first.
        """
        is_here = path.resolve().parent == self.directory.resolve()
        place = _match(path) if is_here else None
        later = [
            other
            for other in self.paths()
            if place is None or ((match := _match(other)) is not None and match > place)
        ]
        for other in later:
            self.set_aside(other, "superseded")
        return later

    def _link_all(
        self, everything: Sequence[StoredCheckpoint], parameters: CheckpointParameters
    ) -> None:
        stored = _newest_of_each_step(everything)
        self._link("newest", stored[-1:])
        self._link("best", _by_monitor(stored, parameters)[:1])

    def _link(self, name: str, target: Sequence[StoredCheckpoint]) -> None:
        """For people and scripts that look for a checkpoint by name. Nothing here reads it."""
        link = self.directory / name
        if link.exists() and not link.is_symlink():
            return  # the user's own
        if not target:
            link.unlink(missing_ok=True)
            return
        beside = link.with_name(f".{name}.tmp")
        # A file system without links has checkpoints all the same.
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
            beside.symlink_to(target[0].path.name)
            beside.replace(link)


def superfluous(
    everything: Sequence[StoredCheckpoint], parameters: CheckpointParameters
) -> Sequence[StoredCheckpoint]:
    """Those that the rules do not keep.

    Args:
        everything: checkpoints of one run, oldest first.
        parameters: the rules.
    """
    stored = _newest_of_each_step(everything)
    keep = [*stored[-parameters.keep_last :]]
    keep += _by_monitor(stored, parameters)[: parameters.keep_top_k]
    if every := parameters.keep_every_n_steps:
        keep += [one for one in stored if one.manifest.step % every == 0]
    kept = {one.path for one in keep}
    return [one for one in everything if one.path not in kept]


def best_first(
    stored: Sequence[StoredCheckpoint], mode: str, monitor: str | None
) -> list[StoredCheckpoint]:
    """By monitored value; those without one, or with NaN, are not among them."""
    sign = 1 if mode == "min" else -1
    valued = [
        (sign * value, -index, one)
        for index, one in enumerate(stored)
        if (value := one.manifest.monitored_value) is not None
        and monitor in (None, one.manifest.monitor)
    ]
    return [one for *_, one in sorted(valued, key=lambda entry: entry[:2])]


def _newest_of_each_step(everything: Sequence[StoredCheckpoint]) -> list[StoredCheckpoint]:
    return list({one.manifest.step: one for one in everything}.values())


def _by_monitor(
    stored: Sequence[StoredCheckpoint], parameters: CheckpointParameters
) -> list[StoredCheckpoint]:
    if parameters.monitor is None:
        return []
    return best_first(stored, parameters.mode, parameters.monitor)


def _match(path: Path) -> tuple[int, int] | None:
    match = _NAME.fullmatch(path.name)
    return (int(match[1]), int(match[2] or 0)) if match and path.is_dir() else None


def _delete(path: Path) -> None:
    # Renamed first: half a deletion must not look like a damaged checkpoint.
    doomed = path.with_name(f".{path.name}.tmp")
    path.rename(doomed)
    shutil.rmtree(doomed)
