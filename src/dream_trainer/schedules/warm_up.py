"""A linear warm-up on top of any scheduler, whenever that one steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar, overload

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dream_trainer.errors import ConfigError

if TYPE_CHECKING:
    from dream_trainer.schedules.schedule import Schedule

Rate = Tensor | float
S = TypeVar("S", bound="Schedule")


class WarmUp(LRScheduler):
    """Raises learning rates linearly to those of a schedule, which goes on underneath.

    The n-th optimizer step has ``n / steps`` of the rate that the schedule asks for, so that the
    first one is not lost to a rate of 0; from the ``steps``-th on it is the schedule's alone. The
    schedule never sees a lowered rate: torch's schedulers multiply what they find.

    Args:
        scheduler: the schedule underneath, of any kind; or an optimizer, for a constant one.
        steps: optimizer steps of the warm-up.

    Attributes:
        scheduler: the schedule underneath; None for a constant one.

    Raises:
        ConfigError: ``steps`` is not a whole number above 0.
    """

    def __init__(self, scheduler: LRScheduler | Optimizer, steps: int) -> None:
        # Not LRScheduler's own, whose first step would be one of the schedule's.
        if type(steps) is not int or steps < 1:
            raise ConfigError("warm_up", [f"steps={steps!r} is not a whole number above 0"])
        self.scheduler: LRScheduler | None = None
        if isinstance(scheduler, Optimizer):
            self.optimizer = scheduler
        else:
            self.scheduler, self.optimizer = scheduler, scheduler.optimizer
        for group in self.optimizer.param_groups:
            # As torch's schedulers do, of which a plateau is none: the rate that was asked for.
            group.setdefault("initial_lr", _copy(group["lr"]))
        self.steps = steps
        self._count = 0
        #: What the schedule asks for, group by group; None once the warm-up is over.
        self._rates: list[Rate] | None = None
        self._lower()

    def step(self, *value: Any) -> None:
        """One optimizer step further: the schedule's step, and the warm-up's."""
        self.step_schedule(*value)
        self.warm()

    def warm(self) -> None:
        """One optimizer step further, where the schedule underneath steps at other times."""
        if self._rates is not None:
            self._put_back()
            self._count += 1
            self._lower()

    def step_schedule(self, *value: Any) -> None:
        """Step the schedule underneath alone.

        Args:
            *value: what its ``step`` takes, if it takes any.
        """
        if self.scheduler is None:
            return
        self._put_back()
        self.scheduler.step(*value)
        self._lower()

    def get_last_lr(self) -> list[Rate]:
        """The rates of the groups as they are."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Steps taken, the rates underneath, and the schedule's own state."""
        inner = None if self.scheduler is None else self.scheduler.state_dict()
        rates = None if self._rates is None else list(self._rates)
        return {"count": self._count, "rates": rates, "scheduler": inner}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`; how long the warm-up is stays as it was made."""
        self._count, rates = state_dict["count"], state_dict["rates"]
        self._rates = None if rates is None else list(rates)
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state_dict["scheduler"])

    def follow_new_groups(self, rates: list[Rate]) -> None:
        """The optimizer has got further parameter groups.

        Args:
            rates: what the schedule asks for in them.
        """
        if self._rates is not None:
            self._rates += rates

    @property
    def factor(self) -> float:
        """What the rates underneath are multiplied by."""
        return min(1.0, (self._count + 1) / self.steps)

    def _put_back(self) -> None:
        if self._rates is not None:
            for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
                _set_rate(group, rate)

    def _lower(self) -> None:
        factor = self.factor
        if factor == 1.0:
            self._rates = None
            return
        groups = self.optimizer.param_groups
        self._rates = [_copy(group["lr"]) for group in groups]
        for group, rate in zip(groups, self._rates, strict=True):
            _set_rate(group, rate * factor)


@overload
def warm_up(scheduler: LRScheduler | Optimizer, steps: int) -> WarmUp: ...
@overload
def warm_up(scheduler: S, steps: int) -> S: ...
def warm_up(scheduler: Any, steps: int) -> Any:
    """Put a linear warm-up on top of a schedule, which goes on underneath.

    Args:
        scheduler: a scheduler; a `Schedule`, whenever it steps, also on a plateau; or an
            optimizer, whose rate stays constant afterwards.
        steps: optimizer steps of the warm-up; the n-th has ``n / steps`` of the schedule's rate.

    Returns:
        A `Schedule` for a `Schedule`; else a scheduler for each optimizer step.

    Raises:
        ConfigError: ``steps`` is not a whole number above 0.
    """
    if isinstance(scheduler, (LRScheduler, Optimizer)):
        return WarmUp(scheduler, steps)
    return replace(scheduler, scheduler=WarmUp(scheduler.scheduler, steps))


def _copy(rate: Rate) -> Rate:
    return rate.clone() if isinstance(rate, Tensor) else rate


def _set_rate(group: dict[str, Any], rate: Rate) -> None:
    """In place where it is a tensor: a captured graph reads that one."""
    if isinstance(group["lr"], Tensor):
        group["lr"].copy_(rate) if isinstance(rate, Tensor) else group["lr"].fill_(rate)
    else:
        group["lr"] = rate
