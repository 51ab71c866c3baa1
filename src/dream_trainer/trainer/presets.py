"""Presets: functions from a configuration to another one, chosen by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from dream_trainer.callbacks import Callback, GradientAccumulationScheduler

if TYPE_CHECKING:
    from dream_trainer.trainer.base import BaseTrainerConfig

Preset = Callable[[Any], Any]
Config = TypeVar("Config", bound="BaseTrainerConfig")

#: What `overfit` repeats and for how long, where the configuration does not say.
_BATCHES, _STEPS = 4, 500


def debug(config: Config) -> Config:
    """One batch of everything: a training step, a validation batch, and nothing on disk.

    Not even a checkpoint of an earlier run is read, except for ``init_from``.
    """
    training = replace(
        config.training_parameters,
        n_epochs=1,
        max_steps=None,
        max_time=None,
        train_steps_per_epoch=1,
        overfit_batches=None,
        gradient_accumulation_steps=1,
        global_batch_size=None,
        val_every_n_epochs=1,
        val_every_n_steps=None,
        val_steps_per_epoch=1,
        num_sanity_val_steps=0,
    )
    return _without_files(config, training_parameters=training, callbacks=_of_one_step(config))


def overfit(config: Config) -> Config:
    """A few batches again and again, until the model knows them by heart; nothing on disk.

    ``overfit_batches`` and ``max_steps`` stay if they are set; else they are 4 and 500. There is
    no validation.
    """
    given = config.training_parameters
    training = replace(
        given,
        n_epochs=None,
        max_steps=given.max_steps or _STEPS,
        train_steps_per_epoch=None,
        overfit_batches=given.overfit_batches or _BATCHES,
        val_every_n_epochs=None,
        val_every_n_steps=None,
        num_sanity_val_steps=0,
    )
    return _without_files(config, training_parameters=training)


def presets_of(trainer_class: type) -> dict[str, Preset]:
    """The presets of a trainer class by name: its own, and those that it inherits.

    Each class has only its own in ``presets``. Of two of one name the nearest one counts, and None
    takes one away.
    """
    found: dict[str, Preset | None] = {}
    for owner in reversed(trainer_class.__mro__):
        own: Mapping[str, Preset | None] = vars(owner).get("presets", {})
        found |= own
    return {name: preset for name, preset in found.items() if preset is not None}


def _of_one_step(config: BaseTrainerConfig) -> dict[str, Callback | None]:
    """The callbacks without what lets a step have several batches."""
    return {
        name: None if isinstance(one, GradientAccumulationScheduler) else one
        for name, one in config.callbacks.items()
    }


def _without_files(config: Config, **changes: Any) -> Config:
    checkpoints = replace(config.checkpoint_parameters, enable=False, resume="never")
    return replace(config, checkpoint_parameters=checkpoints, loggers={}, **changes)
