"""LearningRateMonitor: the learning rate that each step used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.optim import Optimizer

from dream_trainer.callbacks.callback import Callback
from dream_trainer.world.wrappers import unwrap

if TYPE_CHECKING:
    from dream_trainer.trainer.base import BaseTrainer


class LearningRateMonitor(Callback):
    """Logs ``lr/<optimizer>``, or ``lr/<optimizer>/<group>`` if there are several groups."""

    def __init__(self) -> None:
        self._found: dict[Optimizer, tuple[str, Optimizer]] = {}

    def pre_optimizer_step(self, trainer: BaseTrainer, optimizer: Optimizer) -> None:
        """Note the rates before the scheduler changes them."""
        if optimizer not in self._found:
            self._look_up(trainer)
        name, own = self._found[optimizer]
        groups = own.param_groups
        if len(groups) == 1 and isinstance(rate := groups[0]["lr"], float):
            trainer.logged.add_number(name, rate)
        elif len(groups) == 1:
            trainer.logged.add({name: rate})
        else:
            trainer.logged.add({f"{name}/{i}": group["lr"] for i, group in enumerate(groups)})

    def _look_up(self, trainer: BaseTrainer) -> None:
        # Fabric's wrapper takes its time to find an attribute.
        self._found = {
            one: (f"lr/{name}", unwrap(one)) for name, one in trainer.named_optimizers().items()
        }
