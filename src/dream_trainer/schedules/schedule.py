"""Schedule: a learning-rate scheduler, and when it steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from dream_trainer.errors import ConfigError
from dream_trainer.schedules.warm_up import WarmUp

Every = Literal["step", "epoch", "validation"]
_EXAMPLE = 'Schedule(scheduler, every="validation", monitor="val/loss")'


@dataclass(frozen=True)
class Schedule:
    """A learning-rate scheduler, and when it steps. It may stand wherever a scheduler may.

    Raises:
        ConfigError: with all problems of the values at once.
    """

    scheduler: LRScheduler
    """Any scheduler of torch, or an object like one."""
    every: Every = "step"
    """``"step"``: after each optimizer step. ``"epoch"``: at the end of each epoch, after its
    validation. ``"validation"``: after each validation of the run, whenever it comes."""
    monitor: str | None = None
    """The value that the scheduler's ``step`` gets, as ``ReduceLROnPlateau`` needs it: the name of
    a validation result, or ``train/`` and a name for its mean over the training epoch."""
    frequency: int = 1
    """2 steps after every second step, epoch or validation."""

    def __post_init__(self) -> None:
        scheduler, name = self.innermost, type(self.innermost).__name__
        problems = []
        if not all(hasattr(scheduler, one) for one in ("step", "state_dict", "optimizer")):
            problems.append(f"{name} is no scheduler")
        if self.every not in get_args(Every):
            problems.append(f'every={self.every!r} is none of "step", "epoch", "validation"')
        if type(self.frequency) is not int or self.frequency < 1:
            problems.append(f"frequency={self.frequency!r} is not a whole number above 0")
        if isinstance(scheduler, ReduceLROnPlateau):
            if self.monitor is None:
                problems.append(f"{name} looks for a plateau, and no monitor says in which value")
        elif self.monitor is not None and isinstance(scheduler, LRScheduler):
            problems.append(f"monitor={self.monitor!r}, but {name} takes no value")
        if self.every == "step" and self.monitor is not None:
            problems.append(f"monitor={self.monitor!r} is not known after each step")
        if self.every == "validation" and (self.monitor or "").startswith("train/"):
            problems.append(f'{self.monitor} is known at the end of an epoch: every="epoch"')
        if problems:
            raise ConfigError("Schedule", problems, f"Write {_EXAMPLE}, for example.")

    @classmethod
    def of(cls, scheduler: Any) -> Schedule:
        """A scheduler alone steps after each optimizer step; a schedule is what it is.

        Raises:
            ConfigError: the scheduler needs to be told more.
        """
        return scheduler if isinstance(scheduler, Schedule) else cls(scheduler)

    @property
    def innermost(self) -> Any:
        """The scheduler behind a warm-up; None if there is the warm-up alone."""
        scheduler: Any = self.scheduler
        while isinstance(scheduler, WarmUp) and scheduler.scheduler is not None:
            scheduler = scheduler.scheduler
        return scheduler
