"""Timeline: where the time of a run goes, over all its restarts."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from dream_trainer.callbacks.callback import Callback
from dream_trainer.callbacks.checkpoint import BegunSave, CheckpointCallback
from dream_trainer.loggers import TIMELINE_NAME, TimelineFile

if TYPE_CHECKING:
    from dream_trainer.coordination import CountingPlace
    from dream_trainer.trainer.base import BaseTrainer

#: In front of names that loggers show, and that the file need not repeat.
_PREFIX = "throughput/"


class Timeline(Callback):
    """Writes ``timeline.jsonl``: starts, progress, checkpoints, validations and ends, with times.

    It is what really happened, lost steps included; a restart goes on at its end. Written by rank
    0; nothing is if the run writes no directory. What was measured since the last line of
    progress is in the line, and goes to the loggers. No collective, and no state.

    Args:
        every_n_seconds: least time between two lines of progress; validations and the end write
            one, too.
        clock: seconds since 1970.
        stopwatch: seconds from any start.
    """

    def __init__(
        self,
        every_n_seconds: float = 10.0,
        clock: Callable[[], float] = time.time,
        stopwatch: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.every_n_seconds = every_n_seconds
        self._clock, self._stopwatch = clock, stopwatch
        self._file: TimelineFile | None = None
        self._place: CountingPlace | None = None
        self._last_time = self._last_train = self._last_loader = 0.0
        self._num_batches = self._num_samples = self._last_samples = 0
        self._savers: list[CheckpointCallback] = []
        self._begun: list[BegunSave | None] = []
        self._end: tuple[str, str | None] | None = None

    def pre_fit(self, trainer: BaseTrainer) -> None:
        """Note the start, and begin to count."""
        if not trainer.world.is_global_zero:
            return
        self._num_batches = self._num_samples = self._last_samples = 0
        self._end, self._last_train, self._last_loader = None, 0.0, 0.0
        self._savers = [*trainer.callbacks.of_kind(CheckpointCallback).values()]
        self._begun = [one.begun for one in self._savers]
        if trainer.writes_run_directory:
            self._file = TimelineFile(trainer.run_directory / TIMELINE_NAME)
        self._write(
            trainer,
            "start",
            began=round(trainer.began, 3),
            resumed_from=trainer.resumed_from,
            ranks=trainer.world.size,
            host=platform.node(),
            pid=os.getpid(),
            strategy=type(trainer.world.strategy).__name__,
            device=str(trainer.world.device),
        )
        self._place = trainer.place.count_seconds(self._stopwatch)
        self._last_time = self._stopwatch()

    def post_train_step(
        self, trainer: BaseTrainer, result: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count a batch; every few seconds, write."""
        if self._place is None:
            return
        self._num_batches += 1
        self._num_samples += trainer.loop.train_loader.num_samples_all_ranks or 0
        if self._stopwatch() - self._last_time >= self.every_n_seconds:
            self._progress(trainer)

    def post_validation_epoch(self, trainer: BaseTrainer, results: Mapping[str, float]) -> None:
        """Note how long it took."""
        if self._place is not None and trainer.is_fitting:
            self._write(trainer, "validation", took=round(self._place.seconds_here, 3))
            self._progress(trainer)

    def on_boundary(self, trainer: BaseTrainer) -> None:
        """Note a save that was begun."""
        if self._place is None:
            return
        for index, saver in enumerate(self._savers):
            if saver.begun is not self._begun[index]:
                self._begun[index] = begun = saver.begun
                assert begun is not None
                self._write(trainer, "checkpoint", name=begun.name, stall=round(begun.stall, 3))

    def post_fit(self, trainer: BaseTrainer) -> None:
        """Note the last save, and how the run ended."""
        self.on_boundary(trainer)
        reason = trainer.stop_reason
        self._end = ("done", None) if reason is None else ("stopped", reason)

    def on_interrupt(self, trainer: BaseTrainer) -> None:
        """Note the save that was asked for, and the signal."""
        self.on_boundary(trainer)
        self._end = ("interrupted", getattr(sys.exc_info()[1], "signal_name", "SIGINT"))

    def on_exception(self, trainer: BaseTrainer, exception: BaseException) -> None:
        """Note what ended the run."""
        self._end = ("failed", f"{type(exception).__name__}: {exception}")

    def close(self, trainer: BaseTrainer) -> None:
        """Note the end."""
        if self._place is None:
            return
        self._progress(trainer)
        status, reason = self._end or ("failed", None)
        self._write(trainer, "end", status=status, reason=reason)
        self._place.stop_counting()
        self._place = None
        if self._file is not None:
            self._file.close()
            self._file = None

    def _progress(self, trainer: BaseTrainer) -> None:
        assert self._place is not None
        seconds = self._place.seconds
        waited = seconds["loader"] - self._last_loader
        training = waited + seconds["train"] - self._last_train
        num_samples = self._num_samples - self._last_samples
        self._last_time, self._last_samples = self._stopwatch(), self._num_samples
        self._last_train, self._last_loader = seconds["train"], seconds["loader"]
        measured = trainer.measured.take(training)
        own = {"loader_wait": waited / training} if training > 0 else {}
        if training > 0 and num_samples:
            own["samples_per_second"] = num_samples / training
        self._write(
            trainer,
            "progress",
            seconds={name: round(value, 3) for name, value in seconds.items()},
            batches=self._num_batches,
            samples=self._num_samples,
            measured=_rounded(own | {k.removeprefix(_PREFIX): v for k, v in measured.items()}),
        )
        for logger in trainer.loggers.values() if measured else ():
            logger.log_metrics(measured, step=trainer.global_step)

    def _write(self, trainer: BaseTrainer, event: str, **facts: Any) -> None:
        if self._file is not None:
            place = {"step": trainer.global_step, "epoch": trainer.current_epoch}
            self._file.write({"time": round(self._clock(), 3), "event": event, **place, **facts})


def _rounded(values: Mapping[str, float]) -> dict[str, float]:
    """To six digits: clocks say no more."""
    return {name: float(f"{value:.6g}") for name, value in values.items()}
