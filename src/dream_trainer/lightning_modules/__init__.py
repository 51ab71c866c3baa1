"""Run a ``LightningModule`` as it is on this package's loop."""

from dream_trainer.lightning_modules.trainer import (
    LightningModuleTrainer,
    LightningModuleTrainerConfig,
)

__all__ = ["LightningModuleTrainer", "LightningModuleTrainerConfig"]
