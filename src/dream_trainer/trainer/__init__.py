"""The trainers: contract, run, conventions."""

from dream_trainer.trainer.abstract import AbstractTrainer, AbstractTrainerConfig
from dream_trainer.trainer.base import BaseTrainer, BaseTrainerConfig
from dream_trainer.trainer.dream import DreamTrainer
from dream_trainer.trainer.dream_config import DreamTrainerConfig

__all__ = [
    "AbstractTrainer",
    "AbstractTrainerConfig",
    "BaseTrainer",
    "BaseTrainerConfig",
    "DreamTrainer",
    "DreamTrainerConfig",
]
