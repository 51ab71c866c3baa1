"""What ``configure_*`` methods return, in any form, as named components."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from dream_trainer.data import ResumableLoader
from dream_trainer.errors import ConfigError
from dream_trainer.schedules import Schedule
from dream_trainer.world.component_state import parameter_names, parameters_of


def name_optimizers(made: Any, models: Mapping[str, nn.Module]) -> dict[str, Optimizer]:
    """Name what ``configure_optimizers`` returned after the models that they train.

    Raises:
        ConfigError: something is no optimizer, or trains what is in no model.
    """
    names = parameter_names(models)
    named: dict[str, Optimizer] = {}
    for key, optimizer in _pairs(made):
        if not isinstance(optimizer, Optimizer):
            raise ConfigError(
                "configure_optimizers",
                [f"it returned a {type(optimizer).__name__}"],
                "Return an optimizer, a list of them, or {model: optimizer}; schedulers come "
                "from configure_schedulers.",
            )
        trained = (names.get(id(p), "").partition(".")[0] for p in parameters_of([optimizer]))
        owners = "+".join(dict.fromkeys(filter(None, trained))) or "optimizer"
        named[_free_name(key if isinstance(key, str) else owners, named)] = optimizer
    outside = [
        f"optimizer {name} trains a parameter of shape {tuple(p.shape)} that is in no model"
        for name, one in named.items()
        for p in parameters_of([one])
        if id(p) not in names
    ]
    if outside:
        raise ConfigError(
            "configure_optimizers",
            outside,
            "It would not be saved. Assign a module that holds it to self in configure_models.",
        )
    trained_ids = set(map(id, parameters_of(named.values())))
    idle = [
        f"{name}.{parameter}"
        for name, model in models.items()
        for parameter, p in model.named_parameters()
        if p.requires_grad and id(p) not in trained_ids
    ]
    if idle:
        shown = ", ".join(idle[:3]) + (f" and {len(idle) - 3} more" if len(idle) > 3 else "")
        warnings.warn(
            f"no optimizer trains {shown}. Add them in configure_optimizers, or call "
            "requires_grad_(False) on them.",
            stacklevel=2,
        )
    return named


def name_schedules(made: Any, name_of: Callable[[Optimizer], str]) -> dict[str, Schedule]:
    """Name what ``configure_schedulers`` returned after the optimizers.

    Args:
        made: one or several.
        name_of: the name of an optimizer.

    Raises:
        ConfigError: an optimizer has several.
    """
    named: dict[str, Schedule] = {}
    for _, one in _pairs(made):
        schedule = Schedule.of(one)
        name = name_of(schedule.scheduler.optimizer)
        if name in named:
            raise ConfigError(
                "configure_schedulers",
                [f"optimizer {name} has several schedulers"],
                "Join them with torch's SequentialLR or ChainedScheduler.",
            )
        named[name] = schedule
    return named


def resumable(loader: Any) -> ResumableLoader:
    """The loader, resumable."""
    return loader if isinstance(loader, ResumableLoader) else ResumableLoader(loader)


def train_and_val(loaders: Any) -> tuple[Any, Any]:
    """What ``configure_dataloaders`` returned, as (train, val)."""
    if isinstance(loaders, (tuple, list)) and len(loaders) == 2:
        train, val = loaders
    else:
        train, val = loaders, None
    if isinstance(train, (Mapping, tuple)) or not hasattr(train, "__iter__"):
        raise ConfigError(
            "configure_dataloaders",
            [f"it returned a {type(loaders).__name__} that is no loader"],
            "Return (train, val), where val may be None, or the train loader alone.",
        )
    return train, val


def holds_modules(value: Any) -> bool:
    """Whether it is a plain list or mapping of modules, in which torch does not look."""
    if isinstance(value, Mapping):
        value = list(value.values())
    return isinstance(value, (list, tuple)) and any(isinstance(v, nn.Module) for v in value)


def _pairs(made: Any) -> Iterable[tuple[Any, Any]]:
    """(key or None, object) of what a ``configure_*`` method returned."""
    if made is None:
        return
    if isinstance(made, Mapping):
        for key, value in made.items():
            for one in value if isinstance(value, (list, tuple)) else [value]:
                yield key, one
    elif isinstance(made, (list, tuple)):
        yield from ((None, one) for one in made)
    else:
        yield None, made


def _free_name(name: str, taken: Mapping[str, Any]) -> str:
    number, free = 0, name
    while free in taken:
        number += 1
        free = f"{name}_{number}"
    return free
