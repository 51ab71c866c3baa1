"""EMA: an exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch.optim import Optimizer
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dream_trainer.callbacks.weight_averaging import WeightAveraging
from dream_trainer.configs.numbers import is_count, is_number

if TYPE_CHECKING:
    from dream_trainer.trainer.base import BaseTrainer


class EMA(WeightAveraging):
    """Averages weights over the steps of a run, later ones more: Polyak averaging with a decay.

    After each n-th step ``average = decay * average + (1 - decay) * weight``, by torch's own
    ``torch.optim.swa_utils.get_ema_multi_avg_fn``; the average begins as the weights are.

    Args:
        decay: how much of the average stays in an update; from 0 to below 1. It remembers about
            ``1 / (1 - decay)`` updates.
        every_n_steps: optimizer steps from one update to the next.
        start_step: optimizer steps after which the average begins; until then there is none, and
            the model is validated with.
        warm_up: begin with a small decay, so that the first weights are forgotten soon:
            ``min(decay, (1 + n) / (10 + n))`` after ``n`` updates, as ``num_updates`` does in
            TensorFlow's ``tf.train.ExponentialMovingAverage``.
        models: see `WeightAveraging`, as for what follows.
        average_buffers: whether buffers are averaged, too.
        dtype: of the averages.
        evaluate_with: what is validated with.

    Raises:
        ConfigError: with all problems of the arguments at once.
    """

    def __init__(
        self,
        decay: float = 0.999,
        *,
        every_n_steps: int = 1,
        start_step: int = 0,
        warm_up: bool = False,
        models: Sequence[str] | None = None,
        average_buffers: bool = False,
        dtype: torch.dtype | None = None,
        evaluate_with: Literal["average", "model"] = "average",
    ) -> None:
        self.decay, self.every_n_steps = decay, every_n_steps
        self.start_step, self.warm_up = start_step, warm_up
        super().__init__(
            models=models,
            average_buffers=average_buffers,
            dtype=dtype,
            evaluate_with=evaluate_with,
        )

    def problems(self) -> Iterator[str]:
        """What is wrong with the arguments, a sentence each."""
        if not is_number(self.decay) or not 0 <= self.decay < 1:
            yield f"decay={self.decay!r} is not a number from 0 to below 1"
        if not is_count(self.every_n_steps):
            yield f"every_n_steps={self.every_n_steps!r} is not a whole number above 0"
        if self.start_step != 0 and not is_count(self.start_step):
            yield f"start_step={self.start_step!r} is not a whole number from 0"
        yield from super().problems()

    def pre_fit(self, trainer: BaseTrainer) -> None:
        """Begin with the weights of now, if the average has none and its step has come."""
        if trainer.global_step < self.start_step or self.last_step:
            return
        for name in self.optimizer_names.values():
            self._update(name, trainer.global_step)
        if trainer.is_resumed and not self.is_loaded:
            trainer.world.print(
                f"no averaged weights in the checkpoint: {type(self).__name__} begins with the "
                f"model's own at step {trainer.global_step}"
            )

    def post_optimizer_step(self, trainer: BaseTrainer, optimizer: Optimizer) -> None:
        """Update the averages of what it trains, if that is due."""
        if (name := self.optimizer_names.get(optimizer)) is None:
            return
        step = trainer.progress.num_steps
        last = self.last_step.get(name)
        if step >= self.start_step if last is None else step - last >= self.every_n_steps:
            self._update(name, step)

    def decay_after(self, num_updates: int) -> float:
        """The decay of the update that follows so many."""
        if not self.warm_up:
            return self.decay
        return min(self.decay, (1 + num_updates) / (10 + num_updates))

    def _update(self, name: str, step: int) -> None:
        num_updates = self.num_averaged.get(name, 1) - 1
        self.collect(name, step, get_ema_multi_avg_fn(self.decay_after(num_updates)))
