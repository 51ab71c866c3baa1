"""BaseTrainerConfig: the configuration that every run has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dream_trainer.callbacks import Callback
from dream_trainer.configs import CheckpointParameters, TrainingParameters
from dream_trainer.errors import ConfigError
from dream_trainer.trainer.abstract import AbstractTrainerConfig


@dataclass(kw_only=True)
class BaseTrainerConfig(AbstractTrainerConfig):
    """A run's length and rhythm, its checkpoints, its callbacks and loggers."""

    training_parameters: TrainingParameters = field(default_factory=TrainingParameters)
    """Length, accumulation, clipping, validation."""
    checkpoint_parameters: CheckpointParameters = field(default_factory=CheckpointParameters)
    """Triggers, retention, resume."""
    callbacks: dict[str, Callback | None] = field(default_factory=dict)
    """Callbacks by name, on top of ``lr``, ``metrics``, ``summary``, ``progress``, ``checkpoint``
    and ``timeline``; the same name replaces one, None leaves it out."""
    loggers: dict[str, Any] = field(default_factory=dict)
    """Lightning loggers by name, beside the exact JSONL log."""

    def __post_init__(self) -> None:
        super().__post_init__()
        kinds = {
            "training_parameters": TrainingParameters,
            "checkpoint_parameters": CheckpointParameters,
            "callbacks": Mapping,
            "loggers": Mapping,
        }
        problems = [
            f"{name} is a {type(value).__name__}, expected a {kind.__name__}"
            for name, kind in kinds.items()
            if not isinstance(value := getattr(self, name), kind)
        ]
        problems += [
            f"loggers.{name} is a {type(one).__name__}, which has no log_metrics and finalize"
            for name, one in (self.loggers.items() if isinstance(self.loggers, Mapping) else ())
            if one is not None and not (hasattr(one, "log_metrics") and hasattr(one, "finalize"))
        ]
        if problems:
            raise ConfigError(
                type(self).__name__, problems, "Callbacks and loggers are mappings by name."
            )
