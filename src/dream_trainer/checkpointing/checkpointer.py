"""Checkpointer: a run's state to disk and back."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer

from dream_trainer.checkpointing.background import BackgroundSave, stepped_tensors
from dream_trainer.checkpointing.lookup import checkpoint_to_resume, verified
from dream_trainer.checkpointing.store import CheckpointStore, StoredCheckpoint
from dream_trainer.configs import CheckpointParameters
from dream_trainer.errors import CheckpointError
from dream_trainer.storage import (
    Like,
    Manifest,
    Ranks,
    StagingBuffers,
    flatten,
    read_tree,
    save_directory,
)

if TYPE_CHECKING:
    from dream_trainer.world import DreamWorld

#: Parts of a state that differ from rank to rank; the rest is the same on every rank, or
#: sharded over them.
LOCAL = (
    ("rng",),
    ("dataloaders",),
    *(("trainer", name) for name in ("metrics", "buffers", "window", "logged", "monitored")),
)


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A state that was read, and where from."""

    state: dict[str, Any]
    manifest: Manifest
    path: Path


class Checkpointer:
    """Saves states as checkpoints of one format, whatever the strategy, and finds them again.

    A checkpoint is written beside, synced, verified by its manifest and renamed; killed at any
    instant a save leaves the old set, or the old set and a whole new one. Every method is
    called on every rank.

    With ``parameters.async_save`` a save returns once its state is copied, and is written behind
    the training; at most one is under way. A program that ends waits for it.

    Args:
        directory: where the checkpoints are, ``runs/.../checkpoints``.
        world: ranks and collectives; the default is one process.
        parameters: retention, and whether saves are written behind the training.
    """

    def __init__(
        self,
        directory: str | Path,
        world: DreamWorld | None = None,
        parameters: CheckpointParameters | None = None,
    ) -> None:
        if world is None:
            # Here: exporting a checkpoint needs this module, and no Fabric.
            from dream_trainer.world import DreamWorld

            world = DreamWorld()
        self.world = world
        self.parameters = parameters if parameters is not None else CheckpointParameters()
        self.store = CheckpointStore(Path(directory))
        self._buffers = StagingBuffers()
        self._under_way: BackgroundSave | None = None
        self._copies_at_once = False

    def save(
        self,
        state: Mapping[str, Any],
        *,
        step: int,
        epoch: int = 0,
        monitored: float | None = None,
        optimizers: Iterable[Optimizer] = (),
    ) -> Path:
        """Commit a checkpoint, then delete those that retention does not keep.

        Waits for the save under way, if there is one; if that failed, it is reported.

        Args:
            state: nested plain data and tensors.
            step: optimizer steps taken.
            epoch: epochs completed.
            monitored: value of ``parameters.monitor``, if it is known.
            optimizers: their parameters and state are copied beside the next forward and
                backward, and their next step waits for that. Without, everything is copied before
                this returns.

        Returns:
            Where it is, or will be.

        Raises:
            CheckpointError: writing failed; older checkpoints are untouched. If it is written
                behind the training, `wait` raises it.
        """
        self.report(wait=True)
        entries = flatten(*split_local(state), rank=self.world.rank)
        path = self.world.ranks.on_zero(lambda: self.store.path_for(step))
        facts = self._facts(step, epoch, monitored)
        if not self.parameters.async_save:
            self._commit(path, entries, facts, self.world.ranks)
            return path
        optimizers, ranks = tuple(optimizers), self.world.background_ranks()
        stable = () if self._copies_at_once else stepped_tensors(optimizers)
        staged = self._buffers.stage(entries, stable)

        def commit() -> None:
            self._commit(path, staged.entries, facts, ranks, staged.wait)

        self._under_way = BackgroundSave(staged, commit, optimizers, self.world.device)
        return path

    @property
    def is_saving(self) -> bool:
        """Whether a save was begun whose outcome is not reported."""
        return self._under_way is not None

    def finish_copy(self) -> None:
        """Return once weights may change by something else than a step of an optimizer."""
        if self._under_way is not None:
            self._under_way.finish_copy()

    def report(self, *, wait: bool = False) -> bool:
        """Warn if the last save failed.

        Args:
            wait: until the save under way is done; otherwise it is not looked at yet.

        Returns:
            False if it has failed and was not reported before.
        """
        failure = self._outcome(wait)
        if failure is not None and self.world.is_global_zero:
            warnings.warn(f"a checkpoint was not saved. {failure}", RuntimeWarning, stacklevel=2)
        return failure is None

    def wait(self) -> None:
        """Return once the save under way is committed.

        Raises:
            CheckpointError: it failed; older checkpoints are untouched.
        """
        if (failure := self._outcome(wait=True)) is not None:
            raise failure

    def write(
        self,
        path: str | Path,
        state: Mapping[str, Any],
        *,
        step: int,
        epoch: int = 0,
        monitored: float | None = None,
    ) -> None:
        """Commit a checkpoint under a path of one's own; it is there when this returns."""
        self.report(wait=True)
        entries = flatten(*split_local(state), rank=self.world.rank)
        facts = self._facts(step, epoch, monitored)
        save_directory(Path(path), entries, self.world.ranks, **facts)

    def load(self, path: str | Path, like: Like | None = None) -> LoadedCheckpoint:
        """Verify and read one checkpoint.

        Args:
            path: a checkpoint directory.
            like: templates for tensors that are to come back sharded.

        Raises:
            CheckpointError: it is damaged, unsafe or of another format.
        """
        self.report(wait=True)

        return self._read(self.world.ranks.on_zero(lambda: verified(Path(path))), like)

    def resume(
        self, resume: str = "auto", like: Like | None = None, *, read_only: bool = False
    ) -> LoadedCheckpoint | None:
        """Find and read the checkpoint that a run continues from.

        Damaged ones are reported, renamed and passed over; leftovers of killed saves are removed.

        Args:
            resume: ``"auto"``, ``"never"``, ``"must"`` or a path, as in
                `CheckpointParameters`.
            like: templates for tensors that are to come back sharded.
            read_only: remove and rename nothing; another process may be writing there.

        Returns:
            None if there is nothing to continue from and that is allowed.

        Raises:
            ConfigError: ``"never"``, but the directory has checkpoints; or ``"must"``, but not.
            CheckpointError: the path, or every checkpoint, is damaged.
        """
        self.report(wait=True)
        stored = self.world.ranks.on_zero(
            lambda: checkpoint_to_resume(self.store, self.parameters, resume, read_only=read_only)
        )
        return None if stored is None else self._read(stored, like)

    def _commit(
        self,
        path: Path,
        entries: Mapping[str, Tensor],
        facts: Mapping[str, Any],
        ranks: Ranks,
        ready: Callable[[], object] = bool,
    ) -> None:
        """Write, then tidy up."""
        save_directory(path, entries, ranks, ready, **facts)
        ranks.on_zero(self._tidy)

    def _tidy(self) -> None:
        try:
            self.store.prune(self.parameters)
        except OSError as error:
            text = f"the checkpoint is saved, but older ones could not be deleted: {error}"
            warnings.warn(text, RuntimeWarning, stacklevel=2)

    def _outcome(self, wait: bool) -> CheckpointError | None:
        """Why the save under way failed; None if it did not, or is not done."""
        save = self._under_way
        if save is None or not (wait or save.is_done):
            return None
        save.finish()
        self._under_way = None
        # The program changes weights by itself, and will do so again.
        self._copies_at_once |= save.is_torn
        return save.failure

    def _facts(self, step: int, epoch: int, monitored: float | None) -> dict[str, Any]:
        return {
            "step": step,
            "epoch": epoch,
            "monitor": self.parameters.monitor,
            "monitored": _as_json(monitored),
        }

    def _read(self, stored: StoredCheckpoint, like: Like | None) -> LoadedCheckpoint:
        shared, local = read_tree(stored.path, like, rank=self.world.rank)
        return LoadedCheckpoint(join_local(shared, local), stored.manifest, stored.path)


def split_local(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Separate what differs between ranks from the rest. The argument stays as it is."""
    shared = {
        key: dict(value) if isinstance(value, Mapping) else value for key, value in state.items()
    }
    local: dict[str, Any] = {}
    for path in LOCAL:
        parent = shared if len(path) == 1 else shared.get(path[0], {})
        if isinstance(parent, dict) and path[-1] in parent:
            local[".".join(path)] = parent.pop(path[-1])
    return shared, local


def join_local(shared: dict[str, Any], local: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `split_local`."""
    for path in LOCAL:
        if (name := ".".join(path)) in local:
            parent = shared if len(path) == 1 else shared.setdefault(path[0], {})
            parent[path[-1]] = local[name]
    return shared


def _as_json(value: float | None) -> float | str | None:
    if value is None or abs(value) < float("inf"):
        return value
    return str(float(value))
