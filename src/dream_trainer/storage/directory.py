"""Commit of a checkpoint directory: written beside, checked, renamed."""

from __future__ import annotations

import importlib.metadata
import shutil
import uuid
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from dream_trainer.errors import CheckpointError
from dream_trainer.storage.atomic import fsync_directory
from dream_trainer.storage.dcp import write_tree
from dream_trainer.storage.manifest import Manifest, checksums
from dream_trainer.storage.tree import Tree

T = TypeVar("T")
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
        **facts: fields of the :class:`Manifest`: step, epoch, monitor, monitored.

    Raises:
        CheckpointError: some rank failed; raised on every rank, and nothing is left behind.
    """

    def begin() -> Path:
        final.parent.mkdir(parents=True, exist_ok=True)
        return final.with_name(f".{final.name}.{uuid.uuid4().hex[:8]}.tmp")

    beside = _on_rank_zero(begin, rank, world_size, final)
    files: dict[str, dict[str, int]] = {}
    failure: BaseException | None = None
    try:
        files = checksums(write_tree(beside, shared, local, rank=rank, world_size=world_size))
    except Exception as error:
        failure = error
    # Every rank's part is complete before any rank calls the directory a checkpoint.
    reports = _all_gather((files, failure and f"{type(failure).__name__}: {failure}"), world_size)
    problems = [f"rank {r}: {error}" for r, (_, error) in enumerate(reports) if error]
    if problems:
        if rank == 0:
            shutil.rmtree(beside, ignore_errors=True)
        raise CheckpointError(str(final), problems) from failure

    def commit() -> Manifest:
        manifest = Manifest(
            files={name: record for part, _ in reports for name, record in part.items()},
            world_size=world_size,
            saved_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            versions={name: _version(name) for name in _PACKAGES},
            **facts,
        )
        manifest.write(beside)
        if final.exists():
            move_aside(final, "superseded")
        beside.rename(final)
        fsync_directory(final.parent)
        return manifest

    return _on_rank_zero(commit, rank, world_size, final)


def move_aside(path: Path, reason: str) -> Path:
    """Rename a file or directory to ``<name>.<reason>-<n>``; nothing is deleted."""
    n = 1
    while (target := path.with_name(f"{path.name}.{reason}-{n}")).exists():
        n += 1
    return path.rename(target)


def _on_rank_zero(function: Callable[[], T], rank: int, world_size: int, place: Path) -> T:
    """Run on rank 0 and hand its result, or its failure, to every rank."""
    outcome: tuple[Any, str | None] = (None, None)
    cause: Exception | None = None
    if rank == 0:
        try:
            outcome = (function(), None)
        except Exception as error:
            cause, outcome = error, (None, f"{type(error).__name__}: {error}")
    if world_size > 1:
        # Costs one round trip: the others must neither run ahead of rank 0 nor wait for ever.
        box = [outcome]
        dist.broadcast_object_list(box, src=0)
        outcome = box[0]
    result, problem = outcome
    if problem is not None:
        raise CheckpointError(str(place), [problem]) from cause
    return result  # type: ignore[no-any-return]


def _all_gather(value: T, world_size: int) -> list[T]:
    if world_size == 1:
        return [value]
    values: list[Any] = [None] * world_size
    dist.all_gather_object(values, value)
    return values


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
