"""The start of a run: continue, start from weights, or start afresh."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dream_trainer.errors import StateError
from dream_trainer.trainer.run_directory import record_config

if TYPE_CHECKING:
    from dream_trainer.trainer.base import BaseTrainer


def restore(trainer: BaseTrainer) -> None:
    """Load what ``checkpoint_parameters`` say, and tell it in one line. Writes nothing.

    Args:
        trainer: set up.

    Raises:
        ConfigError: ``resume`` forbids what there is, or demands what there is not.
        CheckpointError: no whole checkpoint is left.
        StateError: the checkpoint does not fit the trainer.
    """
    parameters, directory = trainer.checkpoint_parameters, trainer.run_directory
    loaded = None
    if parameters.enable or parameters.resume not in ("auto", "never", "must"):
        loaded = trainer.checkpointer.resume(parameters.resume, trainer.components.template())
    if loaded is not None:
        trainer.load_state_dict(loaded.state)
        manifest = loaded.manifest
        trainer.world.print(
            f"resuming {directory} at step {manifest.step}, epoch {manifest.epoch} "
            f"({loaded.path.name}, saved {manifest.saved_at})"
        )
    elif parameters.init_from is not None:
        _load_weights(trainer, parameters.init_from)


def open_run_directory(trainer: BaseTrainer) -> None:
    """Record the configuration of the run that is about to write there."""
    directory, world = trainer.run_directory, trainer.world
    if not trainer.is_resumed:
        world.print(f"new run in {directory}")
    if world.is_global_zero:
        is_other = record_config(directory, trainer.describe_config(trainer.config))
        if is_other:
            world.print("the configuration is not the one this run had: see config.yaml*")


def _load_weights(trainer: BaseTrainer, path: str) -> None:
    loaded = trainer.checkpointer.load(path, trainer.components.template())
    weights = {"models": loaded.state.get("models", {})}
    problems = [p for p in trainer.components.problems(weights) if p.startswith("models")]
    if problems:
        raise StateError(path, problems, "Fix the model, or leave out init_from.")
    trainer.components.load_state_dict(weights)
    trainer.world.print(f"weights from {path}")
