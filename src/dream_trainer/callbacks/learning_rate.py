"""LearningRateMonitor: the learning rate that each step used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.optim import Optimizer

from dream_trainer.callbacks.callback import Callback

if TYPE_CHECKING:
    from dream_trainer.trainer.base import BaseTrainer


class LearningRateMonitor(Callback):
    """Logs ``lr/<optimizer>``, or ``lr/<optimizer>/<group>`` if there are several groups."""

    def pre_optimizer_step(self, trainer: BaseTrainer, optimizer: Optimizer) -> None:
        """Note the rates before the scheduler changes them."""
        name = f"lr/{trainer.get_name_by_optimizer(optimizer)}"
        groups = optimizer.param_groups
        if len(groups) == 1:
            trainer.log_dict({name: groups[0]["lr"]})
        else:
            trainer.log_dict({f"{name}/{i}": group["lr"] for i, group in enumerate(groups)})
