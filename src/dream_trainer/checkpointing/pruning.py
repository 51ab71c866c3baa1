"""Deleting checkpoints of a run that nobody is training, by the rules of retention."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dream_trainer.checkpointing.inventory import ListedCheckpoint, RunFolder, stored
from dream_trainer.checkpointing.store import StoredCheckpoint, superfluous
from dream_trainer.configs import CheckpointParameters
from dream_trainer.errors import CheckpointError, ConfigError
from dream_trainer.storage.run_lock import RunLock


@dataclass(frozen=True)
class Pruning:
    """What the rules mean for a run as it is now."""

    doomed: Sequence[StoredCheckpoint]
    """To be deleted, oldest first."""
    kept: Sequence[StoredCheckpoint]
    """What stays and is whole; the last one was read to make sure."""
    damaged: Sequence[ListedCheckpoint]
    """Left alone, and not counted by any rule."""

    @property
    def num_bytes(self) -> int:
        """What deleting frees."""
        return sum(one.manifest.num_bytes for one in self.doomed)


@contextlib.contextmanager
def nobody_trains(directory: Path) -> Iterator[None]:
    """Keep training processes out of a run's directory for a while.

    Raises:
        ConfigError: one is there.
    """
    if not any((directory / name).exists() for name in (".lock", "config.yaml")):
        yield  # a loop of the user's own, which takes no lock
        return
    lock = RunLock(directory)
    try:
        lock.acquire()
    except ConfigError as error:
        raise ConfigError(
            str(directory), error.problems, "Wait for it, or stop it. Nothing was deleted."
        ) from None
    try:
        yield
    finally:
        lock.release()


def plan_pruning(run: RunFolder, rules: CheckpointParameters) -> Pruning:
    """Find out what would be deleted. Nothing is.

    Raises:
        CheckpointError: no checkpoint is whole, so none may be deleted.
    """
    listed = run.checkpoints()
    whole = stored(listed)
    # Sizes do not tell of a flipped bit: a run must not be left with a newest one that is none.
    while whole and whole[-1].manifest.problems(whole[-1].path):
        whole.pop()
    if not whole:
        raise CheckpointError(
            str(run.directory), ["it has no whole checkpoint"], "Nothing was deleted."
        )
    protected = {whole[-1].path} | _best_by_link(run, rules)
    doomed = [one for one in superfluous(whole, rules) if one.path not in protected]
    going = {one.path for one in doomed}
    intact = {one.path for one in whole}
    return Pruning(
        doomed=doomed,
        kept=[one for one in whole if one.path not in going],
        damaged=[one for one in listed if one.path not in intact],
    )


def carry_out(
    plan: Pruning, run: RunFolder, rules: CheckpointParameters
) -> Iterator[StoredCheckpoint]:
    """Delete what is to be deleted, one after the other, each given once it is gone.

    Raises:
        CheckpointError: one cannot be deleted.
    """
    for one in plan.doomed:
        try:
            run.store.delete([one.path])
        except OSError as error:
            raise CheckpointError(
                str(one.path), [f"cannot be deleted: {error}"], "Check whose it is."
            ) from error
        yield one
    if rules.monitor is not None:
        run.store.link(rules)  # the best one may be gone


def _best_by_link(run: RunFolder, rules: CheckpointParameters) -> set[Path]:
    """What ``best`` points at, where nothing else says which one is the best."""
    link = run.store.directory / "best"
    if rules.monitor is not None or not link.is_symlink():
        return set()
    return {link.parent / link.readlink()}
