"""Plain dataclasses. They check themselves when made and never ask the environment."""

from dream_trainer.configs.checkpoint import CheckpointParameters
from dream_trainer.configs.device import DeviceParameters
from dream_trainer.configs.links import Link
from dream_trainer.configs.quantities import Duration, Size
from dream_trainer.configs.training import TrainingParameters

__all__ = [
    "CheckpointParameters",
    "DeviceParameters",
    "Duration",
    "Link",
    "Size",
    "TrainingParameters",
]
