"""The sweep: a callback that sets a growing learning rate before every optimizer step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor
from torch.optim import Optimizer

from dream_trainer.callbacks import Callback
from dream_trainer.errors import ConfigError
from dream_trainer.metrics import merge_ranks, totals
from dream_trainer.tuning.smoothing import RunningAverage

if TYPE_CHECKING:
    from dream_trainer.trainer.base import BaseTrainer

Mode = Literal["exponential", "linear"]


@dataclass(frozen=True)
class Sweep:
    """Which rates are tried, and when the test ends early.

    Args:
        min_lr: rate of the first step.
        max_lr: rate of the last one.
        steps: optimizer steps.
        mode: whether a step multiplies the rate or adds to it.
        smoothing: weight of the past in the running average of the loss, below 1.
        early_stop_threshold: see `is_diverged`; None never stops.
        optimizer: name of the only optimizer whose rate grows; None for all.
        loss: name of the loss among the values of a step.
    """

    min_lr: float
    max_lr: float
    steps: int
    mode: Mode
    smoothing: float
    early_stop_threshold: float | None
    optimizer: str | None
    loss: str

    def rate(self, step: int) -> float:
        """The rate of a step, from 0."""
        part = step / (self.steps - 1)
        if self.mode == "linear":
            return self.min_lr + part * (self.max_lr - self.min_lr)
        return float(self.min_lr * (self.max_lr / self.min_lr) ** part)

    def is_diverged(self, loss: float, best: float) -> bool:
        """Whether a smoothed loss is so far above the best one that going on tells nothing.

        Above ``early_stop_threshold`` times the best; measured as a distance, so that it also
        holds for a loss below zero.
        """
        if self.early_stop_threshold is None:
            return False
        return loss > best + (self.early_stop_threshold - 1) * abs(best)


class RangeTest(Callback):
    """Sets the rates of a sweep and writes the losses down; the same on every rank.

    Costs a collective, and a host synchronisation, per optimizer step.

    Args:
        sweep: what to try.

    Attributes:
        lrs: rates that were tried.
        losses: of the steps, averaged over the batches of the step and the ranks.
        configured: rate of the configuration; None before the run has begun.
        is_diverged: whether the loss ended the test.
    """

    def __init__(self, sweep: Sweep) -> None:
        self.sweep = sweep
        self.lrs: list[float] = []
        self.losses: list[float] = []
        self.configured: float | None = None
        self.is_diverged = False
        self._average, self._best = RunningAverage(sweep.smoothing), math.inf
        #: id of an optimizer's list of groups -> how each group's rate compares with the tried one.
        self._factors: dict[int, list[float]] = {}
        self._rate, self._last_step = sweep.min_lr, 0

    def pre_fit(self, trainer: BaseTrainer) -> None:
        """Find the rates of the configuration, whose ratios stay.

        Raises:
            ConfigError: there is nothing to try.
        """
        from dream_trainer.lightning_modules import LightningModuleTrainer  # it loads Fabric

        if isinstance(trainer, LightningModuleTrainer):
            trainer.schedules = []  # a module's own schedules are no schedulers of the trainer
        optimizers, name = trainer.named_optimizers(), self.sweep.optimizer
        if name is not None and name not in optimizers:
            raise ConfigError(
                "find_learning_rate",
                [f"there is no optimizer {name!r}"],
                f"There is: {', '.join(optimizers) or 'none'}.",
            )
        swept = list(optimizers.values()) if name is None else [optimizers[name]]
        rates = [[_configured_rate(group) for group in one.param_groups] for one in swept]
        first = next((rate for group in rates for rate in group if rate), None)
        if first is None:
            raise ConfigError(
                "find_learning_rate",
                ["no optimizer has a learning rate above 0, so there is no ratio to keep"],
                "Give the optimizer any rate.",
            )
        self.configured = first
        self._factors = {
            id(one.param_groups): [rate / first for rate in group]
            for one, group in zip(swept, rates, strict=True)
        }

    def pre_train_step(self, trainer: BaseTrainer, batch: Any, batch_idx: int) -> None:
        """Choose the rate: one for all optimizers that step on the batch, however often."""
        self._rate = self.sweep.rate(min(trainer.global_step, self.sweep.steps - 1))

    def pre_optimizer_step(self, trainer: BaseTrainer, optimizer: Optimizer) -> None:
        """Set the rate."""
        groups, rate = optimizer.param_groups, self._rate
        for group, factor in zip(groups, self._factors.get(id(groups), ()), strict=False):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate * factor)
            else:
                group["lr"] = rate * factor

    def on_boundary(self, trainer: BaseTrainer) -> None:
        """Write the step's loss down, and end the test if it has diverged.

        Raises:
            ConfigError: the step has no such loss.
        """
        if trainer.global_step == self._last_step:
            return  # the end of an epoch
        self._last_step = trainer.global_step
        loss = self._loss(trainer)
        self.lrs.append(self._rate)
        self.losses.append(loss)
        smooth = self._average.add(loss)
        self._best = min(self._best, smooth)
        if not math.isfinite(loss) or self.sweep.is_diverged(smooth, self._best):
            self.is_diverged = True
            trainer.stop(f"the loss diverged at a learning rate of {self.lrs[-1]:.3g}")

    def state_dict(self) -> dict[str, Any]:
        """What was found. Ranks that were forked for a notebook send it home."""
        return {
            "lrs": self.lrs,
            "losses": self.losses,
            "configured": self.configured,
            "is_diverged": self.is_diverged,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        vars(self).update(state_dict)

    def _loss(self, trainer: BaseTrainer) -> float:
        parts = trainer.world.gather_data_parallel(totals([trainer.logged.take()])[0])
        means, name = merge_ranks(parts), f"train/{self.sweep.loss}"
        # A value that a step logs by itself has no prefix.
        found = means.get(name, means.get(self.sweep.loss))
        if found is None:
            known = ", ".join(sorted(one.removeprefix("train/") for one in means))
            raise ConfigError(
                "find_learning_rate",
                [f"training_step gave no value named {self.sweep.loss!r}"],
                f"Name the one to look at with loss=...; there is: {known or 'none'}.",
            )
        return found


def _configured_rate(group: Mapping[str, Any]) -> float:
    """Of a group of parameters: the peak of a cycle, or what a warm-up has not lowered yet."""
    # OneCycleLR and CyclicLR write down the first, every scheduler the second.
    return float(group.get("max_lr", group.get("initial_lr", group["lr"])))
