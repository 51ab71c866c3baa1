"""Before the first step of a trainer: launched, named, seeded, set up; and what is let go of."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from dream_trainer.accumulation import AccumulationWindow
from dream_trainer.coordination import Interruption, Place, RankWatch, StopAgreement
from dream_trainer.randomness import seed_everything
from dream_trainer.trainer.loaders import accumulation_scheduler
from dream_trainer.trainer.run_directory import fresh_experiment_name, recorded_or_new_seed

if TYPE_CHECKING:
    from dream_trainer.data import ResumableLoader
    from dream_trainer.trainer.base import BaseTrainer
    from dream_trainer.trainer.trainer_config import BaseTrainerConfig
    from dream_trainer.world import DreamWorld

#: The next one without a name in this process, as in every restart of its job.
_runs_without_name = itertools.count()


def connected(config: BaseTrainerConfig) -> tuple[Place, RankWatch, Interruption]:
    """What looks at the other ranks and at signals."""
    place, parameters = Place(), config.training_parameters
    agreement = StopAgreement(lambda: watch.require_all())
    watch = RankWatch(place, agreement, config.device_parameters.failure_timeout_seconds)
    signals, grace = parameters.preemption_signals, parameters.grace_seconds
    interruption = Interruption(agreement, signals, grace, is_pointless=watch.look_now)
    return place, watch, interruption


def prepare(trainer: BaseTrainer, bind: Callable[[], None]) -> None:
    """See `BaseTrainer.prepare`.

    Args:
        trainer: as made.
        bind: called once there are components.
    """
    callbacks = trainer.callbacks
    callbacks.pre_launch(trainer)
    trainer.world.launch()
    if trainer.is_running:
        trainer.watch.join(trainer.world)
    trainer.place.enter("configure")
    _name_and_seed(trainer)
    seed_everything(trainer.seed)
    callbacks.pre_configure(trainer)
    trainer.configure()
    callbacks.post_configure(trainer)
    trainer.place.enter("setup")
    callbacks.pre_setup(trainer)
    trainer.setup()
    bind()
    trainer.is_prepared = True
    callbacks.post_setup(trainer)


def release(trainer: BaseTrainer) -> None:
    """See `BaseTrainer.release`."""
    try:
        trainer.checkpointer.report(wait=True)
        trainer.loop.close()
    finally:
        trainer.lock.release()


def _name_and_seed(trainer: BaseTrainer) -> None:
    """Give a run without a name or a seed one of its own. A collective."""
    # A copy: another trainer with the same configuration gets a seed and a name of its own.
    trainer.config = config = copy.copy(trainer.config)
    # Drawn or named on rank 0: on its own each rank would come up with another.
    if config.experiment is None:
        from dream_trainer.world.launchers import job_id

        job = job_id(trainer.world.ranks)
        config.experiment = fresh_experiment_name(job, next(_runs_without_name))
    if config.seed is None:
        config.seed = recorded_or_new_seed(trainer.run_directory, trainer.checkpoint_parameters)
    config.seed, config.experiment = trainer.world.broadcast((config.seed, config.experiment))


def window_of_one() -> AccumulationWindow:
    """The window of a trainer that has no ranks yet."""
    return AccumulationWindow(1, 1, _on_its_own)


def window_over(trainer: BaseTrainer, loader: ResumableLoader) -> AccumulationWindow:
    """The window of a run over the batches of its train loader, which looks ahead if need be.

    Raises:
        ConfigError: the callback that changes its size, and the training parameters, disagree.
    """
    world, parameters = trainer.world, trainer.training_parameters
    size = largest = parameters.accumulation(loader.batch_size, world.dp_size)
    if (scheduler := accumulation_scheduler(trainer.callbacks)) is not None:
        scheduler.check(parameters)
        largest = max(size, *scheduler.scheduling.values())
    loader.looks_ahead = largest > 1  # a window must know its last batch
    sum_over_ranks = _on_its_own if world.dp_size == 1 else partial(_sum_over_ranks, world)
    return AccumulationWindow(size, world.dp_size, sum_over_ranks)


def _sum_over_ranks(world: DreamWorld, total: Tensor) -> Tensor:
    # Ranks that share samples add the same number, so the sum is too large by their count.
    summed: Tensor = world.all_reduce(total, op="sum")
    return summed / world.tp_size


def _on_its_own(total: Tensor) -> Tensor:
    return total
