"""The end of a trainer: what it holds of a process group is let go, then the group."""

from __future__ import annotations

import gc
import warnings
import weakref
from typing import TYPE_CHECKING, Any

from torch import nn

from dream_trainer.world.wrappers import forward_module, unwrap

if TYPE_CHECKING:
    from dream_trainer.trainer.base import BaseTrainer


def close(trainer: BaseTrainer) -> None:
    """See `BaseTrainer.close`."""
    held = [weakref.ref(module) for module in _strategy_modules(trainer)]
    trainer.forget_setup()
    for name, value in list(vars(trainer).items()):
        setattr(trainer, name, _as_made(value))
    if held:
        gc.collect()  # DDP is part of a cycle
    if any(module() is not None for module in held):
        warnings.warn(
            "a wrapped model of this trainer is still held by something else, so its process "
            "group stays open: torch could wait for ever at the end of one. Delete what holds "
            "the model before trainer.close().",
            stacklevel=3,
        )
        trainer.world.end_side_groups()
    else:
        trainer.world.close()


def _strategy_modules(trainer: BaseTrainer) -> list[nn.Module]:
    """The modules of strategies that use a process group themselves."""
    if not trainer.is_prepared:
        return []
    inner = [forward_module(module) for module in trainer.sync_modules]
    return [one for one in inner if isinstance(one, nn.parallel.DistributedDataParallel)]


def _as_made(value: Any) -> Any:
    """Without the wrappers of Fabric and its strategy; also in a dict of them."""
    if isinstance(value, nn.Module):
        return unwrap(value)
    if type(value) is dict:
        return {name: _as_made(one) for name, one in value.items()}
    return value
