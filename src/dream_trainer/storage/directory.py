"""Commit of a checkpoint directory: written beside, checked, renamed."""

from __future__ import annotations

import importlib.metadata
import shutil
import uuid
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException

from dream_trainer.errors import CheckpointError
from dream_trainer.storage.atomic import fsync_directory
from dream_trainer.storage.collective import all_gather, on_rank_zero
from dream_trainer.storage.dcp import write_tree
from dream_trainer.storage.manifest import Manifest, checksums
from dream_trainer.storage.tree import Tree

_PACKAGES = ("torch", "lightning", "dream-trainer")


def save_directory(
    final: Path, shared: Tree, local: Tree, *, rank: int = 0, world_size: int = 1, **facts: Any
) -> Manifest:
    """Write a whole checkpoint or none; every rank takes part and returns after the commit.

    An existing directory of that name is moved aside, never overwritten.

    Args:
        final: the name of the directory once it is complete.
        shared: state that is the same on every rank, or sharded over them.
        local: state of this rank alone.
        rank: this rank.
        world_size: how many ranks write.
        **facts: fields of the `Manifest`: step, epoch, monitor, monitored.

    Raises:
        CheckpointError: some rank failed; raised on every rank, and nothing is left behind.
    """

    def begin() -> Path:
        final.parent.mkdir(parents=True, exist_ok=True)
        return final.with_name(f".{final.name}.{uuid.uuid4().hex[:8]}.tmp")

    def commit() -> Manifest:
        manifest = Manifest(
            files={name: record for part, _ in reports for name, record in part.items()},
            world_size=world_size,
            saved_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            versions={name: _version(name) for name in _PACKAGES},
            **facts,
        )
        try:
            manifest.write(beside)
            if final.exists():
                move_aside(final, "superseded")
            beside.rename(final)
        except Exception:
            shutil.rmtree(beside, ignore_errors=True)
            raise
        fsync_directory(final.parent)
        return manifest

    try:
        beside = on_rank_zero(begin, rank, world_size)
        files, failure = _write(beside, shared, local, rank, world_size)
        # Every rank's part is complete before any rank calls the directory a checkpoint.
        reports = all_gather((files, failure), world_size)
        problems = [f"rank {r}: {problem}" for r, (_, problem) in enumerate(reports) if problem]
        if problems:
            if rank == 0:
                shutil.rmtree(beside, ignore_errors=True)
            raise CheckpointError(str(final), problems, "Older checkpoints are untouched.")
        return on_rank_zero(commit, rank, world_size)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            str(final), [f"{type(error).__name__}: {error}"], "Older checkpoints are untouched."
        ) from error


def _write(
    beside: Path, shared: Tree, local: Tree, rank: int, world_size: int
) -> tuple[dict[str, dict[str, int]], str | None]:
    """This rank's files, or why there are none."""
    try:
        written = write_tree(beside, shared, local, rank=rank, world_size=world_size)
        return checksums(written), None
    except (Exception, CheckpointException) as error:  # noqa: BLE001 - the others wait for it
        return {}, f"{type(error).__name__}: {error}"


def move_aside(path: Path, reason: str) -> Path:
    """Rename a file or directory to ``<name>.<reason>-<n>``; nothing is deleted."""
    n = 1
    while (target := path.with_name(f"{path.name}.{reason}-{n}")).exists():
        n += 1
    return path.rename(target)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
