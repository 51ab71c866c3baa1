"""A trainer's loaders: attached to its ranks, checked, counted."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from dream_trainer.callbacks import CallbackList, GradientAccumulationScheduler
from dream_trainer.configs import TrainingParameters
from dream_trainer.data import ResumableLoader
from dream_trainer.errors import ConfigError

if TYPE_CHECKING:
    from dream_trainer.trainer.base import BaseTrainer
    from dream_trainer.world import DreamWorld

#: Loaders that a run cannot do without, if they are there.
_OF_A_RUN = ("train_dataloader", "val_dataloader")


class AdoptedLoaders:
    """The loaders of a trainer, attached to its ranks.

    Args:
        trainer: launched when they are asked for.
    """

    def __init__(self, trainer: BaseTrainer) -> None:
        self._trainer = trainer
        self._in_use: dict[str, ResumableLoader] = {}

    def adopt(self, loader: Any, name: str) -> ResumableLoader:
        """See `adopt_loader`. A collective."""
        one = self._trainer
        return adopt_loader(
            loader, name, one.world, one.seed, one.training_parameters, self._in_use
        )

    def required(self, loader: Any, phase: str) -> ResumableLoader:
        """Adopt the loader of a test or a prediction. A collective.

        Raises:
            ConfigError: it is None.
        """
        if loader is None:
            raise ConfigError(
                phase,
                [f"{type(self._trainer).__name__} has no {phase}_dataloader"],
                f"Write that method, or call {phase}(loader).",
            )
        return self.adopt(loader, phase)

    @property
    def train(self) -> ResumableLoader:
        """The loader that the loop reads; setup has no loop yet."""
        if self._trainer.is_prepared:
            return self._trainer.loop.train_loader
        return self.adopt(self._trainer.train_dataloader, "train_dataloader")

    @property
    def num_training_steps(self) -> int:
        """See `count_training_steps`."""
        loader, one = self.train, self._trainer
        scheduler = accumulation_scheduler(one.callbacks)
        return count_training_steps(loader, one.training_parameters, one.world.dp_size, scheduler)


def adopt_loader(
    loader: Any,
    name: str,
    world: DreamWorld,
    seed: int,
    parameters: TrainingParameters | None = None,
    in_use: dict[str, ResumableLoader] | None = None,
) -> ResumableLoader:
    """Make a loader resumable and tell it which rank this is. A collective.

    Args:
        loader: whatever the user returned.
        name: what the user calls it, for errors.
        world: the ranks.
        seed: fixes order and draws.
        parameters: with a ``global_batch_size``, ``drop_last`` of the train loader drops what
            does not fill a step; with ``overfit_batches``, its first ones are repeated.
        in_use: the trainer's other loaders by name; this one is added.

    Raises:
        ConfigError: ranks disagree on its length or order, there is nothing to train on or to
            validate with, or it is in use already.
    """
    adopted = loader if isinstance(loader, ResumableLoader) else ResumableLoader(loader)
    of_training = parameters if name == "train_dataloader" else None
    samples_per_step = None if of_training is None else of_training.global_batch_size
    _reserve(adopted, name, in_use if in_use is not None else {})
    adopted.attach(
        seed=seed,
        rank=world.dp_rank,
        size=world.dp_size,
        any_rank=world.any if world.size > 1 else bool,
        samples_per_step=samples_per_step,
    )
    if of_training is not None and of_training.overfit_batches is not None:
        adopted.repeat_first(None)  # a fraction is of the whole
        adopted.repeat_first(of_training.overfit_limit(adopted.num_batches))
    _check_agreement(adopted, name, world)
    if adopted.num_batches == 0 and name in _OF_A_RUN:
        raise ConfigError(
            name,
            [_why_empty(adopted, world, samples_per_step)],
            "Use more samples, a smaller batch, or drop_last=False."
            + (" None instead of a loader means no validation." if name.startswith("val") else ""),
        )
    return adopted


def _reserve(loader: ResumableLoader, name: str, in_use: dict[str, ResumableLoader]) -> None:
    """Refuse a second use: validation would rewind the position that training goes on from."""
    # A loader that keeps its position itself has one, also behind two wrappers.
    keeps_position = hasattr(loader.loader, "state_dict")
    for use, other in in_use.items():
        is_same = other is loader or (keeps_position and other.loader is loader.loader)
        if is_same and use != name and "train_dataloader" in (use, name):
            raise ConfigError(
                name,
                [f"it is the same object as {use}, and one object has one position"],
                "Make a loader for each; they may share the data set.",
            )
    in_use[name] = loader


def _check_agreement(loader: ResumableLoader, name: str, world: DreamWorld) -> None:
    """Compare over the ranks what they must agree on, or they would wait for each other."""
    mine = {
        "numbers of batches": _claimed(loader),
        "numbers of samples": loader.length,
        "orders (checksums)": loader.order_checksum,
    }
    per_rank = world.all_gather_object(mine)
    for what in mine:
        values = [of_rank[what] for of_rank in per_rank]
        if len(set(values)) > 1:
            numbers = ", ".join(f"rank {r}: {n}" for r, n in enumerate(values))
            is_order = what.startswith("orders")
            raise ConfigError(
                name,
                [f"the ranks have different {what} ({numbers})"],
                "Let the sampler give all samples, as with one rank; they are divided afterwards."
                if is_order
                else "Give every rank the same number, or use a map-style data set.",
            )


def _claimed(loader: ResumableLoader) -> int | None:
    """Batches of an epoch, also from loaders whose word is not relied on elsewhere."""
    if loader.num_batches is not None:
        return loader.num_batches
    try:
        return len(loader.loader)
    except (TypeError, NotImplementedError):
        return None


def _why_empty(loader: ResumableLoader, world: DreamWorld, samples_per_step: int | None) -> str:
    why = f"batch_size {loader.batch_size}, {world.dp_size} ranks, {loader.length} samples"
    if samples_per_step is not None:
        why += f", global_batch_size {samples_per_step}"
    return f"it has no batches ({why})"


def accumulation_scheduler(callbacks: CallbackList) -> GradientAccumulationScheduler | None:
    """The callback that changes how many batches a step has, if there is one.

    Raises:
        ConfigError: there are several.
    """
    found = callbacks.of_kind(GradientAccumulationScheduler)
    if len(found) > 1:
        raise ConfigError(
            "callbacks",
            [f"{', '.join(found)} all say how many batches a step has"],
            "Keep one GradientAccumulationScheduler.",
        )
    return next(iter(found.values()), None)


def count_training_steps(
    loader: ResumableLoader,
    parameters: TrainingParameters,
    dp_size: int,
    scheduler: GradientAccumulationScheduler | None = None,
) -> int:
    """Optimizer steps of a whole run.

    Args:
        loader: of the training.
        parameters: of the run.
        dp_size: number of data-parallel ranks.
        scheduler: changes the batches per step from epoch to epoch.

    Raises:
        ConfigError: neither ``max_steps`` nor ``n_epochs`` and a loader of known length say, or
            ``train_steps_per_epoch`` is a fraction of an unknown length.
    """
    batches = loader.num_batches
    size = 1 if batches is None else parameters.accumulation(loader.batch_size, dp_size)
    sizes = [(size, parameters.n_epochs or 1)]
    if scheduler is not None:
        sizes = scheduler.sizes(parameters.n_epochs or 1, size)
    by_epochs: int | None = 0
    for size, n_epochs in sizes:
        per_epoch = parameters.step_limit(batches, size)
        if batches is not None:
            in_loader = math.ceil(batches / size)
            per_epoch = min(per_epoch or in_loader, in_loader)
        if per_epoch is None or parameters.n_epochs is None or by_epochs is None:
            by_epochs = None
        else:
            by_epochs += per_epoch * n_epochs
    known = [steps for steps in (by_epochs, parameters.max_steps) if steps is not None]
    if not known:
        raise ConfigError(
            "training_parameters",
            ["the number of steps is not known"],
            "Set max_steps, or n_epochs with a train loader that knows its length.",
        )
    return min(known)
