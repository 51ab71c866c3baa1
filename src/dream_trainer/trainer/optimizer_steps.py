"""What ``step`` of a trainer does to an optimizer, looked up once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.optim import Optimizer

from dream_trainer.errors import UnknownComponentError
from dream_trainer.trainer.components import trained_alone
from dream_trainer.trainer.scheduler_steps import SchedulerSteps
from dream_trainer.world.component_state import gradients
from dream_trainer.world.gradient_norm import scale
from dream_trainer.world.wrappers import unwrap

if TYPE_CHECKING:
    from dream_trainer.trainer.base import BaseTrainer
    from dream_trainer.trainer.nonfinite import StepGuard


@dataclass(frozen=True)
class BoundOptimizer:
    """An optimizer and what belongs to it.

    Args:
        name: of `named_optimizers`.
        optimizer: as the trainer names it.
        own: the user's own, behind Fabric's wrapper.
        stepped: the one whose ``step`` is called: without Fabric's wrapper, if that does nothing.
        step_scheduler: what is called after each of its steps.
        module: the one model that it trains.
        forgets_gradients: whether its ``zero_grad`` is torch's own, which sets them to None after
            asking the profiler: a tenth of the smallest steps.
    """

    name: str
    optimizer: Optimizer
    own: Optimizer
    stepped: Optimizer
    step_scheduler: Callable[[], object] | None
    module: nn.Module | None
    forgets_gradients: bool


class OptimizerSteps:
    """Clips, steps, zeroes gradients and steps schedulers.

    Args:
        trainer: set up.
        schedulers: those that step with the optimizers.
        guard: asked before each step; None where every step is taken.
    """

    def __init__(
        self, trainer: BaseTrainer, schedulers: SchedulerSteps, guard: StepGuard | None = None
    ) -> None:
        from dream_trainer.world.direct import optimizer_to_step

        self._trainer, self._guard = trainer, guard
        optimizers = trainer.named_optimizers()
        modules = trained_alone(trainer.named_models(), optimizers)
        self._bound: Mapping[str, BoundOptimizer] = {
            name: BoundOptimizer(
                name,
                one,
                unwrap(one),
                optimizer_to_step(one),
                schedulers.after_step_of(one),
                modules.get(name),
                type(one).zero_grad is Optimizer.zero_grad and "zero_grad" not in vars(one),
            )
            for name, one in optimizers.items()
        }
        self._only = next(iter(self._bound.values())) if len(self._bound) == 1 else None
        self._device = trainer.world.device

    def take(self, given: Optimizer | str | None) -> Tensor | None:
        """See `BaseTrainer.step`; the window ends with this batch."""
        bound = self._only if given is None and self._only is not None else self._find(given)
        trainer, optimizer = self._trainer, bound.optimizer
        callbacks, window = trainer.callbacks, trainer.window
        parameters = trainer.config.training_parameters
        trainer.place.enter("optimizer step")
        factor = window.gradient_factor(self._device)
        if factor is not None:
            scale(gradients([optimizer]), factor)
        callbacks.pre_optimizer_step(trainer, optimizer)
        norm, guard = None, self._guard
        is_asked_for = parameters.gradient_clip_val is not None or parameters.track_grad_norm
        if is_asked_for or guard is not None:
            norm = trainer.world.clip_gradients(
                optimizer, max_norm=parameters.gradient_clip_val, module=bound.module
            )
        is_taken = guard is None or norm is None or guard.allows(bound.name, bound.own, norm)
        if is_taken:
            bound.stepped.step()
        if bound.forgets_gradients:
            for group in bound.own.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None
        else:
            optimizer.zero_grad()
        if bound.step_scheduler is not None:
            bound.step_scheduler()
        if window.count_step(bound.name):
            trainer.progress.finish_step()
        if guard is not None:
            guard.finish_step(bound.name, is_taken)
        callbacks.post_optimizer_step(trainer, optimizer)
        trainer.place.enter("training_step")
        return norm if is_asked_for else None

    def _find(self, given: Optimizer | str | None) -> BoundOptimizer:
        names = ", ".join(self._bound)
        if not self._bound:
            raise UnknownComponentError(
                "step() finds no optimizer. Return one from configure_optimizers (DreamTrainer) or "
                "named_optimizers."
            )
        if given is None or (isinstance(given, str) and given not in self._bound):
            wanted = "several optimizers" if given is None else f"no optimizer {given!r}"
            raise UnknownComponentError(
                f"step() finds {wanted}. Give it one of these, or its name: {names}"
            )
        name = given if isinstance(given, str) else self._trainer.get_name_by_optimizer(given)
        return self._bound[name]
