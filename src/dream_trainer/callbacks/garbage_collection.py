"""GarbageCollection: Python collects garbage at the same steps on all ranks."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

from dream_trainer.callbacks.callback import Callback
from dream_trainer.errors import ConfigError
from dream_trainer.progress import reaches_multiple

if TYPE_CHECKING:
    from dream_trainer.trainer.base import BaseTrainer


class GarbageCollection(Callback):
    """Collects after every n-th step, and at no other time.

    Left to itself, Python collects when it has counted enough new objects, on each rank at another
    moment, and every other rank waits in the next collective. Objects that refer to each other in
    a circle stay in memory until the next collection.

    Args:
        every_n_steps: collect after every n-th optimizer step.
        generation: oldest generation that is looked at: 1 is quick, 2 finds everything.

    Raises:
        ConfigError: a number that cannot work.
    """

    def __init__(self, every_n_steps: int = 1000, generation: int = 1) -> None:
        problems = []
        if every_n_steps < 1:
            problems.append(f"every_n_steps is {every_n_steps}, and must be above 0")
        if generation not in (0, 1, 2):
            problems.append(f"generation is {generation}; there are 0, 1 and 2")
        if problems:
            raise ConfigError("GarbageCollection", problems)
        self.every_n_steps, self.generation = every_n_steps, generation
        self._last_step = 0
        self._was_enabled: bool | None = None

    def pre_fit(self, trainer: BaseTrainer) -> None:
        """Collect what setting up has left, and take over."""
        self._last_step = trainer.global_step
        self._was_enabled = gc.isenabled()
        gc.disable()
        gc.collect(self.generation)

    def on_boundary(self, trainer: BaseTrainer) -> None:
        """Collect if it is time."""
        step, before = trainer.global_step, self._last_step
        self._last_step = step
        if step != before and reaches_multiple(step, self.every_n_steps, after=before):
            gc.collect(self.generation)

    def close(self, trainer: BaseTrainer) -> None:
        """Give the collection back to Python as it was."""
        was_enabled, self._was_enabled = self._was_enabled, None
        if was_enabled:
            gc.enable()
