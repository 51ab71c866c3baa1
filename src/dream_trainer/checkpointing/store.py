"""The directory of a run's checkpoints: list, newest, best, prune."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Sequence
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
        return next(iter(_ranked(self.list(), mode, monitor)), None)

    def path_for(self, step: int) -> Path:
        """A name for a checkpoint at a step, after all that are there of the same step."""
        name = f"step-{step:08d}"
        # Not the first free one: a deleted name, used again, would count as older than it is.
        revisions = [m[1] for path in self.paths() if (m := _match(path)) and m[0] == step]
        return self.directory / (f"{name}-{max(revisions) + 1}" if revisions else name)

    def prune(self, parameters: CheckpointParameters) -> Sequence[Path]:
        """Point the links ``newest`` and ``best``, and delete what the rules do not keep.

        Returns:
            The deleted paths.
        """
        everything = self.list()
        stored = list({one.manifest.step: one for one in everything}.values())
        ranked: Sequence[StoredCheckpoint] = ()
        if parameters.monitor is not None:
            ranked = _ranked(stored, parameters.mode, parameters.monitor)
        self._link("newest", stored[-1:])
        self._link("best", ranked[:1])
        keep = [*stored[-parameters.keep_last :], *ranked[: parameters.keep_top_k]]
        if every := parameters.keep_every_n_steps:
            keep += [one for one in stored if one.manifest.step % every == 0]
        kept = {one.path for one in keep}
        deleted = [one.path for one in everything if one.path not in kept]
        for path in deleted:
            _delete(path)
        return deleted

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

    def set_aside_after(self, path: Path) -> None:
        """Rename the checkpoints that come after one: the run takes another course from it."""
        if path.resolve().parent != self.directory.resolve():
            return
        later = _match(path)
        for other in self.paths():
            if later is not None and (match := _match(other)) is not None and match > later:
                self.set_aside(other, "superseded")

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


def _match(path: Path) -> tuple[int, int] | None:
    match = _NAME.fullmatch(path.name)
    return (int(match[1]), int(match[2] or 0)) if match and path.is_dir() else None


def _ranked(
    stored: list[StoredCheckpoint], mode: str, monitor: str | None
) -> list[StoredCheckpoint]:
    """Best first; those without a value, or with NaN, are not among them."""
    sign = 1 if mode == "min" else -1
    valued = [
        (sign * value, -index, one)
        for index, one in enumerate(stored)
        if (value := one.manifest.monitored_value) is not None
        and monitor in (None, one.manifest.monitor)
    ]
    return [one for *_, one in sorted(valued, key=lambda entry: entry[:2])]


def _delete(path: Path) -> None:
    # Renamed first: half a deletion must not look like a damaged checkpoint.
    doomed = path.with_name(f".{path.name}.tmp")
    path.rename(doomed)
    shutil.rmtree(doomed)
