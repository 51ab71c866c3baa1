"""Commit of a checkpoint directory: written beside, checked, renamed."""

from __future__ import annotations

import functools
import importlib.metadata
import shutil
import uuid
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from dream_trainer.errors import CheckpointError
from dream_trainer.storage.aside import move_aside
from dream_trainer.storage.atomic import fsync_directory
from dream_trainer.storage.collective import Ranks
from dream_trainer.storage.dcp import write_tree
from dream_trainer.storage.manifest import Manifest, checksums
from dream_trainer.storage.staging import local_part

_ALONE = Ranks()
_PACKAGES = ("torch", "lightning", "dream-trainer")


def save_directory(
    final: Path,
    entries: Mapping[str, Tensor],
    ranks: Ranks = _ALONE,
    ready: Callable[[], object] = bool,
    **facts: Any,
) -> Manifest:
    """Write a whole checkpoint or none; every rank takes part and returns after the commit.

    An existing directory of that name is moved aside, never overwritten.

    Args:
        final: the name of the directory once it is complete.
        entries: what `flatten` gave for this rank.
        ranks: who writes.
        ready: returns, or raises, once the entries may be read.
        **facts: fields of the `Manifest`: step, epoch, monitor, monitored.

    Raises:
        CheckpointError: some rank failed; raised on every rank, and nothing is left behind.
    """
    try:
        beside = ranks.on_zero(lambda: _begin(final))
        # Writing is collective: a rank that cannot begin says so before the others wait for it.
        _agree(ranks, _refusal(beside, entries, ready), final, beside)
        files, problem = _write(beside, entries, ranks)
        # Every rank's part is complete before any rank calls the directory a checkpoint.
        _agree(ranks, problem, final, beside)
        parts = ranks.gather(files)
        manifest = Manifest(
            files={name: record for part in parts for name, record in part.items()},
            world_size=ranks.size,
            saved_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            versions={name: _installed(name) for name in _PACKAGES},
            **facts,
        )
        try:
            ranks.on_zero(lambda: _commit(beside, final, manifest))
        except Exception:
            # On every rank: where they share no directory, each has files of its own.
            shutil.rmtree(beside, ignore_errors=True)
            raise
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            str(final), [f"{type(error).__name__}: {error}"], "Older checkpoints are untouched."
        ) from error
    return manifest


def _begin(final: Path) -> Path:
    final.parent.mkdir(parents=True, exist_ok=True)
    return final.with_name(f".{final.name}.{uuid.uuid4().hex[:8]}.tmp")


def _agree(ranks: Ranks, problem: str | None, final: Path, beside: Path) -> None:
    """Go on only if no rank has a problem."""
    problems = [f"rank {r}: {one}" for r, one in enumerate(ranks.gather(problem)) if one]
    if problems:
        if ranks.rank == 0:
            shutil.rmtree(beside, ignore_errors=True)
        raise CheckpointError(str(final), problems, "Older checkpoints are untouched.")


def _commit(beside: Path, final: Path, manifest: Manifest) -> None:
    # Local disks of several machines, or a relative path and other working directories.
    if problems := manifest.problems(beside, sizes_only=True):
        raise CheckpointError(
            str(final.absolute()),
            [f"rank 0 does not find what all ranks have written: {one}" for one in problems],
            "Let root_dir be a directory that all ranks share, with an absolute path. Older "
            "checkpoints are untouched.",
        )
    manifest.write(beside)
    if final.exists():
        move_aside(final, "superseded")
    beside.rename(final)
    fsync_directory(final.parent)


def _write(
    beside: Path, entries: Mapping[str, Tensor], ranks: Ranks
) -> tuple[dict[str, dict[str, int]], str | None]:
    """This rank's files, or why there are none."""
    try:
        written = write_tree(beside, entries, ranks)
        return checksums(written), None
    except (Exception, CheckpointException) as error:  # noqa: BLE001 - the others wait for it
        return {}, f"{_told(error)} ({_space(beside, entries)[1]})"


def _refusal(
    beside: Path, entries: Mapping[str, Tensor], ready: Callable[[], object]
) -> str | None:
    """Why this rank cannot write, if so."""
    try:
        ready()
    except Exception as error:  # noqa: BLE001 - the others wait for it
        return f"{type(error).__name__}: {error}"
    is_enough, told = _space(beside, entries)
    return None if is_enough else f"no space left on device ({told})"


def _space(beside: Path, entries: Mapping[str, Tensor]) -> tuple[bool, str]:
    """Whether a rank's part has room, and what is needed and free."""
    needed = sum(t.numel() * t.element_size() for t in map(local_part, entries.values()))
    try:
        free = shutil.disk_usage(beside.parent).free
    except OSError as error:
        return True, f"{needed:,} bytes needed, free space unknown: {error}"
    return needed <= free, f"{needed:,} bytes needed, {free:,} free in {beside.parent}"


def _told(error: BaseException) -> str:
    """The failures of ranks that torch wraps, without its traceback."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()), (error, None))[0]
    return f"{type(error).__name__}: {error}"


@functools.cache  # reads files of the environment, at every save
def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
