"""DreamTrainerConfig, apart: names of its module would hide a program's own.

jsonargparse reads the annotations of a subclass with the names of this module over those of the
program, so a program's alias ``Schedule`` would mean what is imported here.
"""

from dataclasses import dataclass

from dream_trainer.trainer.base_config import BaseTrainerConfig


@dataclass(kw_only=True)
class DreamTrainerConfig(BaseTrainerConfig):
    """The configuration of a `DreamTrainer`. Subclass it and add the model's own."""
