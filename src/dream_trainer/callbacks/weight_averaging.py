"""WeightAveraging: what callbacks that average weights have in common."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dream_trainer.callbacks.callback import Callback
from dream_trainer.errors import ConfigError
from dream_trainer.world.component_state import parameter_names, parameters_of
from dream_trainer.world.weight_average import MultiAverage, WeightAverage
from dream_trainer.world.wrappers import unwrap

if TYPE_CHECKING:
    from dream_trainer.trainer.base import BaseTrainer

_EVALUATIONS = ("val", "test", "predict", "export")


class WeightAveraging(Callback):
    """Keeps an average of the weights beside them; derive from it to say when they are averaged.

    Averages are sharded as the weights are. They are in a checkpoint under the callback's name,
    apart from the models, and come back under any strategy and number of ranks. Parameters that are
    frozen have none until they are unfrozen: what does not change is its own average.

    A weight is averaged after the steps of the optimizer that has it, so optimizers that take turns
    each count their own.

    Args:
        models: names of the models to average; None is all that optimizers train.
        average_buffers: average floating-point buffers, the statistics of batch norm for example,
            like parameters; on ranks those of rank 0 count. Otherwise they are the model's own,
            also in a validation of the average.
        dtype: of the averages. None is that of each weight, and float32 for half precision.
        evaluate_with: what `fit` validates with, and `validate`, `test` and `predict`.

    Attributes:
        weight_average: the averages; there once the trainer is set up, as for what follows.
        optimizer_names: the optimizers that train what is averaged, and their names.
        last_step: step of the run at which weights were last averaged, by optimizer.
        num_averaged: weights that are in the averages, by optimizer.
        is_loaded: whether they come from a state.
    """

    holds_weights = True

    def __init__(
        self,
        *,
        models: Sequence[str] | None = None,
        average_buffers: bool = False,
        dtype: torch.dtype | None = None,
        evaluate_with: Literal["average", "model"] = "average",
    ) -> None:
        self.models = None if models is None else list(models)
        self.average_buffers, self.dtype = average_buffers, dtype
        self.evaluate_with = evaluate_with
        self.weight_average: WeightAverage
        self.optimizer_names: dict[Optimizer, str] = {}
        self.last_step: dict[str, int] = {}
        self.num_averaged: dict[str, int] = {}
        self.is_loaded = False
        if problems := [*self.problems()]:
            raise ConfigError(type(self).__name__, problems)

    def problems(self) -> Iterator[str]:
        """What is wrong with the arguments, a sentence each."""
        if self.evaluate_with not in ("average", "model"):
            yield f"evaluate_with={self.evaluate_with!r} is neither 'average' nor 'model'"
        if self.dtype is not None and not self.dtype.is_floating_point:
            yield f"dtype={self.dtype} has no fractions"

    # ------------------------------------------------------------------ the run

    def post_setup(self, trainer: BaseTrainer) -> None:
        """Find the weights, and who trains them. Forgets what another trainer has averaged."""
        found = trainer.components.models
        self._check(trainer)
        chosen = {n: m for n, m in found.items() if self.models is None or n in self.models}
        self.weight_average = WeightAverage(chosen, self.dtype)
        self.last_step, self.num_averaged, self.is_loaded = {}, {}, False
        self.optimizer_names = {}
        self._known: dict[str, int] = {}
        self._names: dict[str, tuple[str, ...]] = {}
        self._waiting: dict[str, list[str]] = {}
        self._buffers: dict[str, list[str]] = {}
        self._all_names = parameter_names(chosen)
        for name, optimizer in trainer.named_optimizers().items():
            self._look_up(name, optimizer)
            trained = {one.partition(".")[0] for one in self._waiting[name]}
            if trained:
                self.optimizer_names[optimizer] = name
            # In the order of the models: a set's order differs by rank, and buffers are shared.
            for model in [m for m in chosen if m in trained] if self.average_buffers else ():
                # Once a step, however many optimizers train the model.
                for others in self._buffers.values():
                    others[:] = [n for n in others if n not in self.weight_average.buffers[model]]
                self._buffers.setdefault(name, []).extend(self.weight_average.buffers[model])

    def pre_optimizer_step(self, trainer: BaseTrainer, optimizer: Optimizer) -> None:
        """Begin with parameters that were unfrozen, or added, before their first step."""
        self.weight_average.require_out_of_place()
        if (name := self.optimizer_names.get(optimizer)) is None or name not in self.last_step:
            return
        if _num_parameters(optimizer) != self._known[name]:
            self._look_up(name, optimizer)
        if self._waiting[name]:
            self._begin(name)

    def collect(self, name: str, step: int, average: MultiAverage) -> None:
        """Take the weights that an optimizer trains into their averages.

        Args:
            name: of the optimizer; the first time its averages begin as what the weights are.
            step: of the run.
            average: one of ``torch.optim.swa_utils``, or like them.
        """
        if name not in self.last_step:
            self._begin(name, with_buffers=True)
            self.num_averaged[name] = 1
        else:
            self.weight_average.update(self._names[name], average, self.num_averaged[name])
            self.num_averaged[name] += 1
        self.last_step[name] = step

    @contextmanager
    def evaluation(self, trainer: BaseTrainer, phase: str) -> Iterator[None]:
        """Around the batches of an evaluation: the averages in place, if there are any."""
        if phase in _EVALUATIONS and self.evaluate_with == "average" and len(self.weight_average):
            with self.swapped(trainer):
                yield
        else:
            yield

    # ------------------------------------------------------------------ what users call

    def average(self) -> dict[str, Tensor]:
        """The averages by ``"model.name"``: live, and sharded as the weights are."""
        return self.weight_average.averages()

    @contextmanager
    def swapped(self, trainer: BaseTrainer) -> Iterator[None]:
        """The averages in the place of the weights, for a block. Every rank enters it.

        However the block ends, the model has its own weights afterwards, to the bit. Inside it the
        state cannot be taken, and no step.

        Args:
            trainer: whose callback this is.

        Raises:
            RuntimeError: nothing is averaged yet, or the averages are in place already.
        """
        if not len(self.weight_average):
            raise RuntimeError(f"{type(self).__name__} has not averaged any weights yet")
        # A save may still be copying the weights.
        trainer.checkpointer.finish_copy()
        if self._buffers and trainer.world.size > 1:
            self._share_buffers(trainer)
        with self.weight_average.in_place():
            yield

    def planned(
        self, models: Mapping[str, nn.Module], optimizers: Mapping[str, Optimizer]
    ) -> list[tuple[Tensor, torch.dtype]]:
        """What is going to have an average, and the types of these, before there is a run.

        Args:
            models: of a trainer, placed and sharded.
            optimizers: of it.
        """
        chosen = {n: m for n, m in models.items() if self.models is None or n in self.models}
        average, names = WeightAverage(chosen, self.dtype), parameter_names(chosen)
        own = {names[id(p)]: p for p in parameters_of(optimizers.values()) if id(p) in names}
        averaged: list[Tensor] = [
            p for n, p in own.items() if p.requires_grad and average.has_weight(n)
        ]
        if self.average_buffers:
            trained = {name.partition(".")[0] for name in own}
            averaged += [
                average.weight(n) for m in chosen if m in trained for n in average.buffers[m]
            ]
        return [(weight, average.dtype_of(weight)) for weight in averaged]

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Averages, and how many weights are in them.

        Raises:
            RuntimeError: the averages are in the place of the model's weights.
        """
        self.weight_average.require_out_of_place()
        return {
            "models": self.weight_average.state_dict(),
            "last_step": dict(self.last_step),
            "num_averaged": dict(self.num_averaged),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` gave, under any strategy; from nothing, have none."""
        state = {"models": {}, "last_step": {}, "num_averaged": {}} | dict(state)
        self.is_loaded = True
        average = self.weight_average
        average.load_state_dict(state["models"])
        kept = self.kept_buffers(state)
        average.discard(n for own in average.buffers.values() for n in own if n not in kept)
        known = set(self.optimizer_names.values())
        self.last_step = {n: step for n, step in state["last_step"].items() if n in known}
        self.num_averaged = {n: state["num_averaged"][n] for n in self.last_step}
        for optimizer, name in self.optimizer_names.items():
            if name in self.last_step:
                # They may be averaged from now on only.
                average.begin([n for n in self._buffers.get(name, ()) if n not in average])
            self._look_up(name, optimizer)

    def kept_buffers(self, state: Mapping[str, Any]) -> set[str]:
        """Names of the buffers whose averages are taken from a state."""
        return {name for own in self._buffers.values() for name in own}

    # ------------------------------------------------------------------ inside

    def _check(self, trainer: BaseTrainer) -> None:
        found, problems = trainer.components.models, []
        unknown = [n for n in self.models or () if n not in found]
        problems += [f"models: there is no {n!r}, but {', '.join(found)}" for n in unknown]
        mine = set(found if self.models is None else self.models)
        several = [
            name
            for name, one in trainer.callbacks.of_kind(WeightAveraging).items()
            if one.evaluate_with == self.evaluate_with == "average"
            and mine.intersection(found if one.models is None else one.models)
        ]
        if len(several) > 1:
            problems.append(f"{' and '.join(several)} are to be in place of the same weights")
        if problems:
            move = "Let one of them have evaluate_with='model'." if len(several) > 1 else ""
            raise ConfigError(f"callbacks ({type(self).__name__})", problems, move)

    def _look_up(self, name: str, optimizer: Optimizer) -> None:
        """Sort the parameters of an optimizer into those that have an average and the others."""
        full = [
            self._all_names[id(parameter)]
            for group in unwrap(optimizer).param_groups
            for parameter in group["params"]
            if id(parameter) in self._all_names
        ]
        own = [one for one in full if self.weight_average.has_weight(one)]
        self._known[name] = _num_parameters(optimizer)
        self._names[name] = tuple(
            n for n in (*own, *self._buffers.get(name, ())) if n in self.weight_average
        )
        self._waiting[name] = [one for one in own if one not in self.weight_average]

    def _begin(self, name: str, *, with_buffers: bool = False) -> None:
        waiting, average = self._waiting[name], self.weight_average
        new = [one for one in waiting if average.weight(one).requires_grad]
        self._waiting[name] = [one for one in waiting if one not in new]
        new += self._buffers.get(name, ()) if with_buffers else ()
        if new:
            average.begin(new)
            self._names[name] = (*self._names[name], *new)

    def _share_buffers(self, trainer: BaseTrainer) -> None:
        """Let all ranks evaluate with what a checkpoint would give them: rank 0's."""
        averages = self.weight_average.averages()
        names = [n for own in self._buffers.values() for n in own if n in averages]
        values = trainer.world.broadcast([averages[n].cpu() for n in names])
        for name, value in zip(names, values, strict=True):
            averages[name].copy_(value)


def _num_parameters(optimizer: Optimizer) -> int:
    return sum(len(group["params"]) for group in unwrap(optimizer).param_groups)
