"""The start of a run: continue, start from weights, or start afresh."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dream_trainer.errors import ConfigError, StateError
from dream_trainer.trainer.run_directory import record_config
from dream_trainer.trainer.warm_start import load_weights

if TYPE_CHECKING:
    from dream_trainer.trainer.base import BaseTrainer


def restore(trainer: BaseTrainer, *, read_only: bool) -> None:
    """Load what ``checkpoint_parameters`` say, and tell it in one line.

    Args:
        trainer: set up.
        read_only: leave the run directory as it is; the run may be under way in another process.

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
            trainer.load_state_dict(loaded.state)
        except StateError as error:
            raise StateError(
                str(loaded.path),
                error.problems,
                "It is of another model, seed or data. Nothing was changed: put them back, choose "
                "another experiment, or start from its weights with init_from.",
            ) from error
        manifest = loaded.manifest
        trainer.world.print(
            f"resuming {directory} at step {manifest.step}, epoch {manifest.epoch} "
            f"({loaded.path.name}, saved {manifest.saved_at})"
        )
    elif parameters.init_from is not None:
        load_weights(trainer, parameters.init_from)


def open_run_directory(trainer: BaseTrainer) -> None:
    """Record the configuration of the run that is about to write there."""
    directory, world = trainer.run_directory, trainer.world
    if not trainer.progress.num_batches:
        world.print(f"new run in {directory}")
    if world.is_global_zero:
        try:
            changed = record_config(directory, trainer.describe_config(trainer.config))
        except OSError as error:
            raise ConfigError(
                "root_dir",
                [f"{directory} cannot be written: {error}"],
                "Choose another root_dir, or checkpoint_parameters.enable=False.",
            ) from error
        if changed:
            shown = ", ".join(changed[:4]) + (", ..." if len(changed) > 4 else "")
            world.print(f"the configuration is not the one this run had: {shown}; see config.yaml*")
