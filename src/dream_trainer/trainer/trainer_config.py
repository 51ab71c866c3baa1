"""The configurations of the trainers, apart from them: names of a module may hide a program's own.

jsonargparse reads the annotations of a subclass with the names of this module over those of the
program, so an alias of the program's would mean what is imported here under the same name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dream_trainer.callbacks import Callback
from dream_trainer.configs import CheckpointParameters, DeviceParameters, TrainingParameters
from dream_trainer.errors import ConfigError


@dataclass(kw_only=True)
class AbstractTrainerConfig:
    """What every run has: a place, a seed, devices.

    Raises:
        ConfigError: with all problems of the values at once.
    """

    project: str = "default"
    """First folder below ``root_dir``."""
    group: str = "default"
    """Second folder."""
    experiment: str | None = None
    """Third folder; running it again continues it. None makes up a readable name, the same on
    every rank and in every restart of the same job."""
    seed: int | None = 42
    """Seed of every random stream of the run. None draws one and records it."""
    root_dir: str = "runs"
    """Where runs are written."""
    device_parameters: DeviceParameters = field(default_factory=DeviceParameters)
    """Devices, layout of ranks, precision."""

    def __post_init__(self) -> None:
        names = {"project": self.project, "group": self.group, "experiment": self.experiment}
        problems = [
            f"{name}={value!r} is not a folder name"
            for name, value in names.items()
            if not (value is None and name == "experiment") and not _is_folder_name(value)
        ]
        if self.seed is not None and self.seed < 0:
            problems.append(f"seed={self.seed} is below 0")
        if problems:
            raise ConfigError(type(self).__name__, problems)


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


@dataclass(kw_only=True)
class DreamTrainerConfig(BaseTrainerConfig):
    """The configuration of a `DreamTrainer`. Subclass it and add the model's own."""


def _is_folder_name(value: object) -> bool:
    return isinstance(value, str) and value not in ("", ".", "..") and not set(value) & set("/\\\0")
