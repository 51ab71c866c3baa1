"""What ``configure_optimizers`` of a LightningModule returns, in every documented form."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from dream_trainer.errors import ConfigError

_PLACE = "configure_optimizers"
_FORMS = (
    "Return one optimizer; a list of them; two lists, of optimizers and of schedulers; a dict with "
    '"optimizer" and perhaps "lr_scheduler"; a list of such dicts; or None.'
)


@dataclass
class Schedule:
    """A learning-rate scheduler and when it steps; Lightning's ``lr_scheduler_config``."""

    scheduler: Any
    interval: Literal["epoch", "step"] = "epoch"
    frequency: int = 1
    """Of the interval: 2 steps after every second one."""
    monitor: str | None = None
    """The value that a plateau is looked for in."""
    reduce_on_plateau: bool = False
    strict: bool = True
    """Raise if the value is missing when it is needed."""
    name: str | None = None

    def is_due(self, interval: str, index: int, *, needs_value: bool) -> bool:
        """Whether it steps now.

        Args:
            interval: which has ended.
            index: of that one, from 0.
            needs_value: whether it is the turn of those that look for a plateau.
        """
        is_kind = self.interval == interval and self.reduce_on_plateau == needs_value
        return is_kind and (index + 1) % self.frequency == 0


def optimizers_and_schedules(made: Any) -> tuple[list[Optimizer], list[Schedule]]:
    """Take apart what ``configure_optimizers`` returned.

    Raises:
        ConfigError: it is of no known form.
    """
    if made is None:
        return [], []
    if isinstance(made, Optimizer):
        return _checked([made], [])
    if isinstance(made, Mapping):
        return _from_mappings([made])
    if isinstance(made, (list, tuple)):
        if len(made) == 2 and isinstance(made[0], (list, tuple)):
            schedulers = made[1] if isinstance(made[1], (list, tuple)) else [made[1]]
            return _checked(list(made[0]), [one for one in schedulers if one is not None])
        if all(isinstance(one, Mapping) for one in made):
            return _from_mappings(made)
        return _checked(list(made), [])
    raise ConfigError(_PLACE, [f"it returned a {type(made).__name__}"], _FORMS)


def _from_mappings(made: Any) -> tuple[list[Optimizer], list[Schedule]]:
    optimizers, schedulers, problems = [], [], []
    for one in made:
        if unknown := sorted(one.keys() - {"optimizer", "lr_scheduler", "monitor"}):
            problems.append(f"its dict has {', '.join(map(repr, unknown))}")
        if "optimizer" not in one:
            problems.append("its dict has no 'optimizer'")
            continue
        optimizers.append(one["optimizer"])
        if (scheduler := one.get("lr_scheduler")) is not None:
            if "monitor" in one and not isinstance(scheduler, Mapping):
                scheduler = {"scheduler": scheduler, "monitor": one["monitor"]}
            schedulers.append(scheduler)
    if problems:
        raise ConfigError(_PLACE, problems, _FORMS)
    return _checked(optimizers, schedulers)


def _checked(
    optimizers: list[Any], schedulers: list[Any]
) -> tuple[list[Optimizer], list[Schedule]]:
    problems = [
        f"it returned a {type(one).__name__} as an optimizer"
        for one in optimizers
        if not isinstance(one, Optimizer)
    ]
    problems += [
        f"{type(one).__name__} evaluates its closure several times a step"
        for one in optimizers
        if isinstance(one, Optimizer) and _needs_closure(one)
    ]
    made = []
    for scheduler in schedulers:
        try:
            made.append(_schedule(scheduler))
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError(_PLACE, problems, _FORMS)
    return optimizers, made


def _schedule(given: Any) -> Schedule:
    options = dict(given) if isinstance(given, Mapping) else {"scheduler": given}
    known = {field.name for field in fields(Schedule)}
    if unknown := sorted(options.keys() - known):
        raise ValueError(f"a scheduler's dict has {', '.join(map(repr, unknown))}")
    scheduler = options.get("scheduler")
    if not hasattr(scheduler, "step") or not hasattr(scheduler, "state_dict"):
        raise ValueError(f"it returned a {type(scheduler).__name__} as a scheduler")
    options.setdefault("reduce_on_plateau", isinstance(scheduler, ReduceLROnPlateau))
    made = Schedule(**options)
    name = type(scheduler).__name__
    if made.interval not in ("epoch", "step"):
        raise ValueError(f'{name}: interval={made.interval!r}, expected "epoch" or "step"')
    if not isinstance(made.frequency, int) or made.frequency < 1:
        raise ValueError(f"{name}: frequency={made.frequency!r}, expected a whole number above 0")
    if made.reduce_on_plateau and made.monitor is None:
        raise ValueError(f'{name} looks for a plateau, and no "monitor" says in which value')
    return made


def _needs_closure(optimizer: Optimizer) -> bool:
    step = type(optimizer).step
    parameter = inspect.signature(step).parameters.get("closure")
    return parameter is not None and parameter.default is inspect.Parameter.empty
