"""Runs aside: some steps of a trainer that leave no trace in the run itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dream_trainer.configs import CheckpointParameters, TrainingParameters
from dream_trainer.errors import ConfigError
from dream_trainer.trainer.base import BaseTrainer


def steps_alone(parameters: TrainingParameters, steps: int, **changes: Any) -> TrainingParameters:
    """The same for so many optimizer steps, without validation.

    Args:
        parameters: of the run.
        steps: optimizer steps.
        **changes: other fields.
    """
    alone: dict[str, Any] = {
        "n_epochs": None,
        "max_steps": steps,
        "max_time": None,
        "val_every_n_epochs": None,
        "val_every_n_steps": None,
        "num_sanity_val_steps": 0,
    }
    return replace(parameters, **alone | changes)


def nothing_on_disk(parameters: CheckpointParameters) -> CheckpointParameters:
    """The same for a run that neither reads nor writes a directory of its own."""
    return replace(parameters, enable=False, resume="never")


def require_trainer(made: object) -> BaseTrainer:
    """What ``make_trainer`` has returned, if there is a loop in it.

    Raises:
        ConfigError: it is no `BaseTrainer`.
    """
    if not isinstance(made, BaseTrainer):
        raise ConfigError(
            "make_trainer",
            [f"it returned a {type(made).__name__}"],
            "Pass a subclass of BaseTrainer, or a function from a configuration to a trainer.",
        )
    return made
