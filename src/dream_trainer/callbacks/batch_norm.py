"""Statistics of batch norm for weights that no step was taken with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dream_trainer.world.component_state import clean_name

if TYPE_CHECKING:
    from dream_trainer.trainer.base import BaseTrainer

_KINDS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_NAMES = ("running_mean", "running_var")

Norm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm


def norm_statistics(trainer: BaseTrainer, models: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Means and variances of the training data at each batch norm, with the weights of now.

    One pass over the training data in `validation_step`: the cumulative average over batches and
    ranks, as ``torch.optim.swa_utils.update_bn`` takes it, except that dropout is off. Models,
    metrics, random streams and the loader are afterwards as they were. Every rank calls it.

    Args:
        trainer: in a run.
        models: whose batch norms are looked at.

    Returns:
        By ``"model.path.running_mean"`` and ``"model.path.running_var"``.
    """
    norms = {
        clean_name(f"{model_name}.{path}").rstrip("."): part
        for model_name, model in models.items()
        for path, part in model.named_modules()
        if isinstance(part, _KINDS) and part.track_running_stats
    }
    if not norms:
        return {}
    before = [
        (one, one.momentum, {name: value.clone() for name, value in one.named_buffers()})
        for one in norms.values()
    ]
    num_batches = 0

    def measure(batch: Any, batch_idx: int, *, is_filler: bool) -> None:
        nonlocal num_batches
        num_batches += not is_filler
        for one in norms.values():
            # A filler would count a sample twice. Where ranks measure together all have to.
            one.training = not is_filler or isinstance(one, nn.SyncBatchNorm)
        trainer.validation_step(batch, batch_idx)

    try:
        for one in norms.values():
            one.reset_running_stats()
            one.momentum = None  # a cumulative average
        trainer.loop.read_training_data(measure)
        measured = {
            f"{path}.{name}": getattr(one, name).clone()
            for path, one in norms.items()
            for name in _NAMES
        }
    finally:
        for one, momentum, buffers in before:
            one.momentum = momentum
            for name, value in buffers.items():
                getattr(one, name).copy_(value)
    return _over_ranks(trainer, measured, num_batches)


def _over_ranks(
    trainer: BaseTrainer, measured: dict[str, Tensor], num_batches: int
) -> dict[str, Tensor]:
    """Means over the batches of all ranks. A collective."""
    world = trainer.world
    if world.size == 1:
        return measured
    total = world.all_reduce(torch.tensor(float(num_batches), device=world.device), op="sum")
    return {
        name: world.all_reduce(value * num_batches, op="sum") / total
        for name, value in measured.items()
    }
