"""The start of a run: continue, start from weights, or start afresh."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from dream_trainer.errors import ConfigError, StateError
from dream_trainer.trainer.run_directory import record_config
from dream_trainer.trainer.state import OwnState

if TYPE_CHECKING:
    from dream_trainer.trainer.base import BaseTrainer

T = TypeVar("T")
#: Lines about a configuration that changed; more would hide the rest of the start.
_MOST_DIFFERENCES = 20


def restore(trainer: BaseTrainer, *, read_only: bool) -> None:
    """Load what ``checkpoint_parameters`` say. ``trainer.origin`` tells it.

    Args:
        trainer: set up.
        read_only: leave the run directory as it is; the run may be under way in another process.
            Then it is told here, for no callback does.

    Raises:
        ConfigError: ``resume`` forbids what there is, or demands what there is not.
        CheckpointError: no whole checkpoint is left.
        StateError: the checkpoint does not fit the trainer.
    """
    parameters, directory = trainer.checkpoint_parameters, trainer.run_directory
    loaded = None
    if parameters.enable or parameters.resume not in ("auto", "never", "must"):
        loaded = trainer.checkpointer.resume(
            parameters.resume, trainer.components.template(), read_only=read_only
        )
    if loaded is not None:
        try:
            trainer.load_state_dict(OwnState(loaded.state))
        except StateError as error:
            raise StateError(
                str(loaded.path),
                error.problems,
                "It is of another model, seed or data. Nothing was changed: put them back, choose "
                "another experiment, or start from its weights with init_from. Another seed or "
                "length of the data can be allowed by name (checkpoint_parameters.allow_changed).",
            ) from error
        manifest, trainer.resumed_from = loaded.manifest, loaded.path.name
        trainer.origin = (
            f"resuming {directory} at {trainer.progress.place} "
            f"({loaded.path.name}, saved {manifest.saved_at})"
        )
    elif parameters.init_from is not None:
        from dream_trainer.trainer.warm_start import load_weights

        trainer.origin = load_weights(trainer, parameters.init_from)
    if read_only and trainer.origin:
        trainer.world.print(trainer.origin)


def restore_once(trainer: BaseTrainer, *, read_only: bool) -> None:
    """`restore`, if the trainer has not done so."""
    if not trainer.is_restored:
        trainer.place.enter("restore")
        restore(trainer, read_only=read_only)
        trainer.is_restored = True


def foretell(trainer: BaseTrainer) -> str:
    """How `fit` would start. It looks at names only: checkpoints are read when they are loaded."""
    parameters, directory = trainer.checkpoint_parameters, trainer.run_directory
    if trainer.origin:
        return trainer.origin
    if parameters.resume not in ("auto", "never", "must"):
        return f"would go on from {parameters.resume} in {directory}"
    if parameters.enable and (newest := trainer.checkpointer.store.newest()) is not None:
        if parameters.resume == "never":
            return f"would be refused: {directory} has checkpoints, and resume='never'"
        return f"would go on in {directory} at step {newest.manifest.step} ({newest.path.name})"
    if parameters.enable and parameters.resume == "must":
        return f"would be refused: {directory} has no checkpoint, and resume='must'"
    where = f"would be a new run in {directory}" if parameters.enable else "nothing on disk"
    if parameters.init_from is not None:
        return f"{where}, with weights from {parameters.init_from}"
    return where


def lock_run_directory(trainer: BaseTrainer, *, create: bool) -> None:
    """Keep other processes out of the run directory. A collective.

    Args:
        trainer: launched.
        create: make the directory; otherwise nothing happens as long as there is none.

    Raises:
        ConfigError: another process trains there, or it cannot be written.
    """
    directory = trainer.run_directory

    def acquire() -> None:
        if create:
            directory.mkdir(parents=True, exist_ok=True)
        if directory.is_dir():
            trainer.lock.acquire()

    _on_rank_zero(trainer, acquire)


def open_run_directory(trainer: BaseTrainer) -> None:
    """Record the configuration of the run that is about to write there. A collective."""
    directory, world = trainer.run_directory, trainer.world
    if not trainer.progress.num_batches:
        weights = f", {trainer.origin}" if trainer.origin else ""
        trainer.origin = f"new run in {directory}{weights}"
    text = trainer.describe_config(trainer.config)
    changed = _on_rank_zero(trainer, lambda: record_config(directory, text))
    if changed:
        world.print("this run had another configuration, which is kept as config.yaml.superseded*:")
        for line in changed[:_MOST_DIFFERENCES]:
            world.print(f"  {line}")
        if (more := len(changed) - _MOST_DIFFERENCES) > 0:
            world.print(f"  and {more} more")


def _on_rank_zero(trainer: BaseTrainer, function: Callable[[], T]) -> T:
    """The result, or the error, on every rank: alone, the others would wait for rank 0."""

    def guarded() -> T:
        try:
            return function()
        except OSError as error:
            raise ConfigError(
                "root_dir",
                [f"{trainer.run_directory} cannot be written: {error}"],
                "Choose another root_dir, or checkpoint_parameters.enable=False.",
            ) from error

    return trainer.world.ranks.on_zero(guarded)
