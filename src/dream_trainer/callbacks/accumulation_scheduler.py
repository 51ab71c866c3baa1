"""GradientAccumulationScheduler: another number of batches per step from some epochs on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from dream_trainer.callbacks.callback import Callback
from dream_trainer.errors import ConfigError

if TYPE_CHECKING:
    from dream_trainer.configs import TrainingParameters
    from dream_trainer.trainer.base import BaseTrainer


class GradientAccumulationScheduler(Callback):
    """Changes ``gradient_accumulation_steps`` at the beginning of epochs.

    ``GradientAccumulationScheduler({0: 8, 4: 4, 8: 1})``: 8 batches per step in the epochs 0 to 3,
    4 in the epochs 4 to 7, then 1. Before the first key it is ``gradient_accumulation_steps``.

    Args:
        scheduling: epoch, from 0 -> batches per optimizer step from then on.

    Raises:
        ConfigError: with all problems of the values at once.
    """

    def __init__(self, scheduling: Mapping[int, int]) -> None:
        problems = [] if scheduling else ["it is empty"]
        for epoch, size in scheduling.items():
            if type(epoch) is not int or epoch < 0:
                problems.append(f"epoch {epoch!r} is not a whole number from 0")
            if type(size) is not int or size < 1:
                problems.append(f"{size!r} batches per step is not a whole number above 0")
        if problems:
            raise ConfigError("GradientAccumulationScheduler", problems, "Write {0: 8, 4: 1}.")
        self.scheduling = dict(sorted(scheduling.items()))

    def check(self, parameters: TrainingParameters) -> None:
        """Refuse what says otherwise how many batches a step has.

        Raises:
            ConfigError: something does.
        """
        problems = []
        if parameters.global_batch_size is not None:
            problems.append(
                f"global_batch_size={parameters.global_batch_size} derives the batches per step"
            )
        if 0 in self.scheduling and parameters.gradient_accumulation_steps != 1:
            problems.append(
                f"gradient_accumulation_steps={parameters.gradient_accumulation_steps} is said "
                f"for epoch 0 as well as {self.scheduling[0]}"
            )
        if problems:
            raise ConfigError("GradientAccumulationScheduler", problems, "Leave one of them out.")

    def size_in(self, epoch: int, otherwise: int) -> int:
        """Batches per optimizer step in an epoch.

        Args:
            epoch: from 0.
            otherwise: before the first key.
        """
        sizes = [size for first, size in self.scheduling.items() if first <= epoch]
        return sizes[-1] if sizes else otherwise

    def sizes(self, n_epochs: int, otherwise: int) -> list[tuple[int, int]]:
        """Batches per optimizer step, and how many epochs have them, in order.

        Args:
            n_epochs: of the run.
            otherwise: before the first key.
        """
        firsts = [epoch for epoch in {0: None, **self.scheduling} if epoch < n_epochs]
        ends = [*firsts[1:], n_epochs]
        return [
            (self.size_in(first, otherwise), end - first)
            for first, end in zip(firsts, ends, strict=True)
        ]

    def pre_fit(self, trainer: BaseTrainer) -> None:
        """The run may go on in any epoch."""
        self._set(trainer)

    def pre_epoch(self, trainer: BaseTrainer) -> None:
        """No window is open between two epochs."""
        self._set(trainer)

    def _set(self, trainer: BaseTrainer) -> None:
        otherwise = trainer.training_parameters.gradient_accumulation_steps
        trainer.window.size = self.size_in(trainer.current_epoch, otherwise)
