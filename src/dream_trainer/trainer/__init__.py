"""The trainers: contract, run, conventions."""

from dream_trainer.trainer.abstract import AbstractTrainer
from dream_trainer.trainer.base import BaseTrainer
from dream_trainer.trainer.dream import DreamTrainer
from dream_trainer.trainer.trainer_config import (
    AbstractTrainerConfig,
    BaseTrainerConfig,
    DreamTrainerConfig,
)

__all__ = [
    "AbstractTrainer",
    "AbstractTrainerConfig",
    "BaseTrainer",
    "BaseTrainerConfig",
    "DreamTrainer",
    "DreamTrainerConfig",
]
