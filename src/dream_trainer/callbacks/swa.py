"""SWA: the mean of the weights of the last part of a run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.swa_utils import get_swa_multi_avg_fn

from dream_trainer.callbacks.batch_norm import norm_statistics
from dream_trainer.callbacks.checkpoint import CheckpointCallback
from dream_trainer.callbacks.weight_averaging import WeightAveraging
from dream_trainer.configs.numbers import is_count, is_number
from dream_trainer.errors import ConfigError
from dream_trainer.world.wrappers import unwrap

if TYPE_CHECKING:
    from dream_trainer.trainer.base import BaseTrainer


class SWA(WeightAveraging):
    """Stochastic weight averaging: the equal mean of the weights at the end of each late epoch.

    Izmailov et al. 2018, "Averaging Weights Leads to Wider Optima and Better Generalization"
    (https://arxiv.org/abs/1803.05407), by torch's own
    ``torch.optim.swa_utils.get_swa_multi_avg_fn``. Until the first weights are taken the model is
    validated with.

    Args:
        start_epoch: the first epoch, counted from 0, whose weights are taken. A fraction is of
            ``n_epochs``; 0.75, as in the paper, if ``start_step`` is not given either.
        start_step: instead, optimizer steps after which weights are taken; a fraction is of the
            steps of the run.
        every: ``"epoch"``, at the end of its training part; or optimizer steps from one to the
            next.
        learning_rate: which all optimizers of the averaged models go to when it starts; by
            optimizer, if it is a mapping. None leaves the rates to the schedules.
        anneal_steps: optimizer steps in which they go there, on the curve of torch's ``SWALR``.
            Schedules are overruled from the start on.
        annealing: ``"cos"`` or ``"linear"``.
        update_bn: at the end of the run, take the statistics of batch norm anew: one pass over the
            training data, in `validation_step`, with the average in place. Until then the average
            is validated with the statistics of the model. Nothing happens without batch norm.
        models: see `WeightAveraging`, as for what follows.
        dtype: of the averages.
        evaluate_with: what is validated with.

    Raises:
        ConfigError: with all problems of the arguments at once.
    """

    def __init__(
        self,
        *,
        start_epoch: int | float | None = None,
        start_step: int | float | None = None,
        every: Literal["epoch"] | int = "epoch",
        learning_rate: float | dict[str, float] | None = None,
        anneal_steps: int = 0,
        annealing: Literal["cos", "linear"] = "cos",
        update_bn: bool = True,
        models: Sequence[str] | None = None,
        dtype: torch.dtype | None = None,
        evaluate_with: Literal["average", "model"] = "average",
    ) -> None:
        self.start_epoch, self.start_step, self.every = start_epoch, start_step, every
        if start_epoch is None and start_step is None:
            self.start_epoch = 0.75
        self.learning_rate, self.anneal_steps = learning_rate, anneal_steps
        self.annealing, self.update_bn = annealing, update_bn
        self._first = 0
        self._annealed_from: dict[str, dict[str, Any]] = {}
        self._measured: list[str] = []
        super().__init__(models=models, dtype=dtype, evaluate_with=evaluate_with)

    def problems(self) -> Iterator[str]:
        """What is wrong with the arguments, a sentence each."""
        for name in ("start_epoch", "start_step"):
            value = getattr(self, name)
            is_fraction = isinstance(value, float) and 0 <= value < 1
            if not (value is None or value == 0 or is_count(value) or is_fraction):
                yield f"{name}={value!r} is neither a whole number nor a fraction below 1"
        if self.start_epoch is not None and self.start_step is not None:
            yield "start_epoch and start_step are both set"
        if self.every != "epoch" and not is_count(self.every):
            yield f"every={self.every!r} is neither 'epoch' nor a whole number above 0"
        if self.anneal_steps != 0 and not is_count(self.anneal_steps):
            yield f"anneal_steps={self.anneal_steps!r} is not a whole number from 0"
        if self.annealing not in ("cos", "linear"):
            yield f"annealing={self.annealing!r} is neither 'cos' nor 'linear'"
        rates = self.learning_rate
        for rate in rates.values() if isinstance(rates, Mapping) else [rates]:
            if rate is not None and (not is_number(rate) or not rate >= 0):
                yield f"learning_rate={rate!r} is not a number from 0"
        yield from super().problems()

    # ------------------------------------------------------------------ the run

    def post_setup(self, trainer: BaseTrainer) -> None:
        """Find the weights, and who trains them."""
        super().post_setup(trainer)
        self._annealed_from, self._measured = {}, []
        known = set(self.optimizer_names.values())
        rates = self.learning_rate if isinstance(self.learning_rate, Mapping) else {}
        if unknown := [name for name in rates if name not in known]:
            raise ConfigError(
                "callbacks (SWA)",
                [
                    f"learning_rate: no optimizer {name!r} trains what is averaged"
                    for name in unknown
                ],
                f"There is: {', '.join(known)}.",
            )

    def pre_fit(self, trainer: BaseTrainer) -> None:
        """Find out where it starts."""
        self._first = self._resolved_start(trainer)

    def pre_optimizer_step(self, trainer: BaseTrainer, optimizer: Optimizer) -> None:
        """Set the rates of the step."""
        super().pre_optimizer_step(trainer, optimizer)
        # A schedule may have stepped since the step before.
        self._anneal(trainer, optimizer)

    def post_optimizer_step(self, trainer: BaseTrainer, optimizer: Optimizer) -> None:
        """Take the weights, if that is due, and set the rates of the next step."""
        if (name := self.optimizer_names.get(optimizer)) is None or not self._has_started(trainer):
            return
        self._anneal(trainer, optimizer)
        if isinstance(self.every, int):
            step, last = trainer.progress.num_steps, self.last_step.get(name)
            if last is None or step - last >= self.every:
                self._take(name, step)

    def post_train_epoch(self, trainer: BaseTrainer) -> None:
        """Take the weights, if that is due."""
        if self.every == "epoch" and self._has_started(trainer):
            for name in self.optimizer_names.values():
                self._take(name, trainer.global_step)

    def post_fit(self, trainer: BaseTrainer) -> None:
        """Take the statistics of batch norm for the average."""
        if not (self.update_bn and len(self.weight_average)) or self._measured:
            return
        chosen = {
            n: m for n, m in trainer.components.models.items() if n in self.weight_average.buffers
        }
        with self.swapped(trainer):
            statistics = norm_statistics(trainer, chosen)
        if statistics:
            self.weight_average.put(statistics)
            self._measured = list(statistics)
            for one in map(trainer.callbacks.__getitem__, trainer.callbacks):
                if isinstance(one, CheckpointCallback):
                    one.save_again()

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Averages, what the rates come from, and which statistics were taken."""
        return {
            **super().state_dict(),
            "annealed_from": {name: dict(one) for name, one in self._annealed_from.items()},
            "measured": list(self._measured),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` gave, under any strategy; from nothing, have none."""
        state = {"annealed_from": {}, "measured": []} | dict(state)
        self._annealed_from = {n: dict(one) for n, one in state["annealed_from"].items()}
        self._measured = list(state["measured"])
        super().load_state_dict(state)

    def kept_buffers(self, state: Mapping[str, Any]) -> set[str]:
        """Names of the buffers whose averages are taken from a state."""
        return super().kept_buffers(state) | set(state["measured"])

    # ------------------------------------------------------------------ inside

    def _resolved_start(self, trainer: BaseTrainer) -> int:
        by_epochs = self.start_step is None
        share = (self.start_epoch if by_epochs else self.start_step) or 0
        if not isinstance(share, float):
            return share
        n_epochs = trainer.training_parameters.n_epochs
        if by_epochs and n_epochs is None:
            raise ConfigError(
                "callbacks (SWA)",
                [f"start_epoch={share} is a fraction of n_epochs, which is not set"],
                "Set n_epochs, or give a number of epochs, or start_step.",
            )
        length = n_epochs if by_epochs and n_epochs else trainer.num_training_steps
        return int(round(share * length, 6))

    def _has_started(self, trainer: BaseTrainer) -> bool:
        progress = trainer.progress
        return (progress.epoch if self.start_step is None else progress.num_steps) >= self._first

    def _take(self, name: str, step: int) -> None:
        if self._measured:
            # Those of an average that is no more.
            self.weight_average.discard(self._measured)
            self._measured = []
        self.collect(name, step, get_swa_multi_avg_fn())

    def _anneal(self, trainer: BaseTrainer, optimizer: Optimizer) -> None:
        if self.learning_rate is None or (name := self.optimizer_names.get(optimizer)) is None:
            return
        if not self._has_started(trainer):
            return
        target = self.learning_rate
        if isinstance(target, Mapping):
            if name not in target:
                return
            target = target[name]
        groups, step = unwrap(optimizer).param_groups, trainer.progress.num_steps
        if name not in self._annealed_from:
            rates = [float(group["lr"]) for group in groups]
            self._annealed_from[name] = {"step": step, "rates": rates}
        first = self._annealed_from[name]
        done = step - first["step"]
        share = 1.0 if done >= self.anneal_steps else done / self.anneal_steps
        if self.annealing == "cos":
            share = (1 - math.cos(math.pi * share)) / 2
        # A group that was added later is at the end of the way.
        for group, rate in zip(groups, [*first["rates"], *[target] * len(groups)], strict=False):
            _set_rate(group, share * target + (1 - share) * rate)


def _set_rate(group: dict[str, Any], rate: float) -> None:
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate
