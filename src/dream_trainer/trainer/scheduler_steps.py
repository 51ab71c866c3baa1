"""When the learning-rate schedules of a trainer step."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from dream_trainer.errors import ConfigError
from dream_trainer.schedules import Schedule, WarmUp
from dream_trainer.world.wrappers import unwrap

if TYPE_CHECKING:
    from dream_trainer.trainer.base import BaseTrainer


class SchedulerSteps:
    """Steps schedules after optimizer steps, epochs and validations.

    Args:
        trainer: whose components exist.

    Raises:
        ConfigError: a schedule can never step.
    """

    def __init__(self, trainer: BaseTrainer) -> None:
        self._trainer = trainer
        self._schedules = dict(trainer.named_schedules())
        #: Of those that do not step every time, how often their time came.
        self._counts = {n: 0 for n, one in self._schedules.items() if one.frequency > 1}
        if trainer.val_dataloader is None:
            never = [
                f"{name} steps after validations, and val_dataloader is None"
                for name, one in self._schedules.items()
                if one.every == "validation"
            ]
            if never:
                raise ConfigError(
                    "schedules", never, 'Return a loader for them, or use every="epoch".'
                )
        for one in self._schedules.values():
            if one.monitor is not None:
                trainer.monitored.watch(one.monitor)

    def after_step_of(self, optimizer: Optimizer) -> Callable[[], object] | None:
        """What to call after each step of an optimizer; None if there is nothing."""
        for name, one in self._schedules.items():
            scheduler = one.scheduler
            if unwrap(scheduler.optimizer) is not unwrap(optimizer):
                continue
            if one.every == "step":
                own = scheduler.step if one.frequency == 1 else partial(self._step, name, one)
                if one.frequency > 1 and isinstance(scheduler, WarmUp):
                    return _both(own, scheduler.warm)
                return own
            return scheduler.warm if isinstance(scheduler, WarmUp) else None
        return None

    def after(self, every: str) -> None:
        """An epoch, or a validation of the run, is over."""
        due = [(name, one) for name, one in self._schedules.items() if one.every == every]
        if not due:
            return
        with warnings.catch_warnings():
            # Of a run that went on just before: torch counts the optimizer's steps by process.
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            for name, one in due:
                self._step(name, one)

    def state_dict(self) -> dict[str, int]:
        """Counts by name; the schedulers have states of their own."""
        return dict(self._counts)

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        """The inverse of `state_dict`."""
        self._counts |= {name: state_dict.get(name, 0) for name in self._counts}

    def _step(self, name: str, schedule: Schedule) -> None:
        if schedule.frequency > 1:
            self._counts[name] += 1
            if self._counts[name] % schedule.frequency:
                return
        value: tuple[Any, ...] = ()
        if schedule.monitor is not None:
            value = (self._trainer.monitored.value(schedule.monitor, f"schedule of {name}"),)
        scheduler = schedule.scheduler
        if isinstance(scheduler, WarmUp):
            scheduler.step_schedule(*value)
        else:
            scheduler.step(*value)


def _both(first: Callable[[], object], second: Callable[[], object]) -> Callable[[], None]:
    def call() -> None:
        first()
        second()

    return call
