"""Batches, windows and steps of a run, asked of the loaders that it would train with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

from dream_trainer.callbacks import GradientAccumulationScheduler
from dream_trainer.configs import TrainingParameters
from dream_trainer.data import ResumableLoader
from dream_trainer.errors import ConfigError
from dream_trainer.trainer.loaders import count_training_steps

T = TypeVar("T")


@dataclass(frozen=True)
class LoaderPlan:
    """One epoch of a loader. None where the loader cannot tell."""

    samples: int | None
    """Samples of the data, over all ranks."""
    samples_used: int | None
    """Of them in the epoch, after ``drop_last``."""
    batch_size: int | None
    """Samples per batch on one rank."""
    batches: int | None
    """Batches on each rank."""
    last_batch_samples: int | None
    """Samples of the last batch over all ranks."""
    idle_ranks: int | None
    """Data-parallel ranks that get a filler in the last batch, a sample that does not count."""


@dataclass(frozen=True)
class StepPlan:
    """Optimizer steps. None where nothing tells."""

    accumulation: int | None
    """Batches per step on each rank."""
    samples_per_step: int | None
    """Samples of a whole step over all ranks."""
    per_epoch: int | None
    """Steps of an epoch."""
    last_window: int | None
    """Batches of the last step of an epoch, where they are fewer than ``accumulation``."""
    total: int | None
    """Steps of the run; ``max_time`` may end it earlier."""
    val_batches: int | None = None
    """Batches of one validation on each rank, where ``val_steps_per_epoch`` limits them."""


def plan_loader(loader: ResumableLoader, dp_size: int) -> LoaderPlan:
    """One epoch of a loader that is attached to rank 0 of ``dp_size``."""
    batches, length = loader.num_batches, loader.length
    is_counted = loader.state_dict()["unit"] == "samples"
    if not is_counted or batches is None or length is None:
        return LoaderPlan(None, None, loader.batch_size, batches, None, None)
    last = used = idle = None
    if loader.batch_size is not None and batches:
        before = (batches - 1) * loader.batch_size * dp_size
        last = _samples_from(loader, before)
        used, idle = before + last, max(dp_size - last, 0)
    elif ahead := loader.num_samples_ahead(batches):
        # Of a batch sampler: batches may differ in size, and are dealt out whole.
        last, used = ahead[-1], sum(ahead)
    return LoaderPlan(length, used, loader.batch_size, batches, last, idle)


def plan_steps(
    loader: ResumableLoader,
    parameters: TrainingParameters,
    dp_size: int,
    scheduler: GradientAccumulationScheduler | None = None,
) -> StepPlan:
    """Steps of a run with a loader that is attached to rank 0 of ``dp_size``.

    Where a scheduler changes the batches per step, all but the total is of the first epoch.

    Raises:
        ConfigError: ``global_batch_size`` cannot be made of whole batches, or
            ``train_steps_per_epoch`` is a fraction of an unknown length.
    """
    batch_size, batches = loader.batch_size, loader.num_batches
    size = parameters.accumulation(batch_size, dp_size)
    if scheduler is not None:
        scheduler.check(parameters)
        size = scheduler.size_in(0, size)
    parameters.step_limit(batches, size)  # reported here: what is not known is left out below
    one_epoch = replace(parameters, n_epochs=1, max_steps=None)
    all_batches = replace(one_epoch, train_steps_per_epoch=None)
    per_epoch = _known(lambda: count_training_steps(loader, one_epoch, dp_size, scheduler))
    in_loader = _known(lambda: count_training_steps(loader, all_batches, dp_size, scheduler))
    is_whole = per_epoch == in_loader
    rest = batches % size if batches is not None and is_whole else 0
    return StepPlan(
        accumulation=size,
        samples_per_step=None if batch_size is None else batch_size * dp_size * size,
        per_epoch=per_epoch,
        last_window=rest or None,
        total=_known(lambda: count_training_steps(loader, parameters, dp_size, scheduler)),
    )


def too_few_samples(name: str, plan: LoaderPlan, dp_size: int) -> ConfigError | None:
    """Why some ranks would never train, if so."""
    if plan.samples is None or plan.samples >= dp_size:
        return None
    return ConfigError(
        name,
        [
            f"{plan.samples} samples for {dp_size} data-parallel ranks: "
            f"{dp_size - plan.samples} of them never get one"
        ],
        "Use fewer ranks, more samples, or a larger tensor_parallel.",
    )


def _samples_from(loader: ResumableLoader, position: int) -> int:
    """Samples over all ranks in the batch at a position."""
    # Asked at the position, not added up from the beginning: an epoch may have 10 million batches.
    state = loader.state_dict()
    loader.load_state_dict({**state, "position": position})
    (samples,) = loader.num_samples_ahead(1) or (0,)
    loader.load_state_dict(state)
    return samples


def _known(count: Callable[[], T]) -> T | None:
    try:
        return count()
    except ConfigError:
        return None
