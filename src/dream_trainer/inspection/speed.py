"""How fast a trainer steps, and how much of it is its loader."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dream_trainer.errors import ConfigError
from dream_trainer.inspection.throw_away import Answer, ChangedBatches, run_thrown_away

if TYPE_CHECKING:
    from dream_trainer.trainer.base import BaseTrainer, BaseTrainerConfig


@dataclass(frozen=True)
class Benchmark:
    """The speed of a run of a few steps. ``str()`` is a line of a table."""

    steps: int
    """Optimizer steps that were timed."""
    seconds: float
    """What they took together, by the clock of this rank."""
    samples: int | None
    """Samples in them, over all ranks; None if the loader cannot tell."""
    ranks: int
    """Processes of the run."""
    device: str
    """Kind of device."""
    is_cached: bool
    """Whether all of them had the same batch, which was loaded once."""

    @property
    def steps_per_second(self) -> float:
        """Optimizer steps a second."""
        return self.steps / self.seconds

    @property
    def samples_per_second(self) -> float | None:
        """Samples a second over all ranks; None if the loader cannot tell."""
        return None if self.samples is None else self.samples / self.seconds


def benchmark(
    make_trainer: Callable[[Any], BaseTrainer],
    config: BaseTrainerConfig,
    *,
    steps: int = 20,
    warmup: int = 5,
    cached_batch: bool = False,
) -> Benchmark:
    """Time some steps of a trainer, with its own loader and callbacks, and throw the run away.

    Nothing is read from or written to the run directory, and there are no loggers and no
    validation. On an accelerator the clock is read when all queued work is done. Every rank calls
    it.

    Args:
        make_trainer: a trainer class, or a function from a configuration to a trainer.
        config: what it is called with; it stays as it is.
        steps: optimizer steps to time.
        warmup: steps before them.
        cached_batch: load one batch, on each rank, and use it in every step: what is then faster
            is the loader's share.

    Raises:
        ConfigError: ``steps`` or ``warmup`` cannot work, or the run ended before them.
    """
    problems = [f"steps is {steps}, and must be above 0"] if steps < 1 else []
    problems += [f"warmup is {warmup}, and must not be below 0"] if warmup < 0 else []
    if problems:
        raise ConfigError("benchmark", problems)
    stopwatch = _Stopwatch(warmup, warmup + steps, cached_batch)
    result: Benchmark = run_thrown_away(
        make_trainer, config, steps=warmup + steps, answer=stopwatch
    )
    return result


class _Stopwatch(Answer):
    """Times the steps from one number to another."""

    def __init__(self, begin_at: int, end_at: int, is_cached: bool) -> None:
        self._begin_at, self._end_at, self._is_cached = begin_at, end_at, is_cached
        self._began: float | None = None
        self._first_step = self._samples = 0
        self._is_done = False

    def pre_fit(self, trainer: BaseTrainer) -> None:
        if self._is_cached:
            ChangedBatches(trainer.loop.train_loader, is_cached=True).install(trainer)
        if self._begin_at == 0:
            self._begin(trainer)

    def post_train_step(
        self, trainer: BaseTrainer, result: Any, batch: Any, batch_idx: int
    ) -> None:
        self._samples += trainer.loop.train_loader.num_samples or 0

    def on_boundary(self, trainer: BaseTrainer) -> None:
        step = trainer.global_step
        if self._began is None:
            if step >= self._begin_at:
                self._begin(trainer)
        elif step >= self._end_at and not self._is_done:
            self._is_done = True
            trainer.world.synchronize()
            seconds = time.perf_counter() - self._began
            world, knows = trainer.world, trainer.loop.train_loader.num_samples is not None
            parts = world.gather_data_parallel(self._samples if knows else None)
            samples = None if None in parts else sum(part or 0 for part in parts)
            steps, device = step - self._first_step, world.device.type
            found = Benchmark(steps, seconds, samples, world.size, device, self._is_cached)
            self.tell(trainer, found)

    def _begin(self, trainer: BaseTrainer) -> None:
        trainer.world.synchronize()
        self._first_step, self._samples = trainer.global_step, 0
        self._began = time.perf_counter()
