"""A trainer's loaders: attached to its ranks, checked, counted."""

from __future__ import annotations

import math
from typing import Any

from dream_trainer.configs import TrainingParameters
from dream_trainer.data import ResumableLoader
from dream_trainer.errors import ConfigError
from dream_trainer.world import DreamWorld


def adopt_loader(loader: Any, name: str, world: DreamWorld, seed: int) -> ResumableLoader:
    """Make a loader resumable and tell it which rank this is. A collective.

    Args:
        loader: whatever the user returned.
        name: what the user calls it, for errors.
        world: the ranks.
        seed: fixes order and draws.

    Raises:
        ConfigError: ranks disagree on its length, or there is nothing to train on.
    """
    adopted = loader if isinstance(loader, ResumableLoader) else ResumableLoader(loader)
    adopted.attach(
        seed=seed,
        rank=world.dp_rank,
        size=world.dp_size,
        any_rank=world.any if world.size > 1 else bool,
    )
    lengths = world.all_gather_object(adopted.num_batches)
    if len(set(lengths)) > 1:
        numbers = ", ".join(f"rank {r}: {n}" for r, n in enumerate(lengths))
        raise ConfigError(
            name,
            [f"the ranks have different numbers of batches ({numbers})"],
            "Give every rank the same number, or use a map-style data set.",
        )
    if lengths[0] == 0 and name == "train_dataloader":
        raise ConfigError(
            name,
            [f"it has no batches (batch_size {adopted.batch_size}, {world.dp_size} ranks)"],
            "Use more samples, a smaller batch, or drop_last=False.",
        )
    return adopted


def count_training_steps(
    loader: ResumableLoader, parameters: TrainingParameters, dp_size: int
) -> int:
    """Optimizer steps of a whole run.

    Raises:
        ConfigError: neither ``max_steps`` nor ``n_epochs`` and a loader of known length say.
    """
    per_epoch = parameters.train_steps_per_epoch
    if (batches := loader.num_batches) is not None:
        in_loader = math.ceil(batches / parameters.accumulation(loader.batch_size, dp_size))
        per_epoch = min(per_epoch or in_loader, in_loader)
    by_epochs = per_epoch * parameters.n_epochs if per_epoch and parameters.n_epochs else None
    known = [steps for steps in (by_epochs, parameters.max_steps) if steps is not None]
    if not known:
        raise ConfigError(
            "training_parameters",
            ["the number of steps is not known"],
            "Set max_steps, or n_epochs with a train loader that knows its length.",
        )
    return min(known)
