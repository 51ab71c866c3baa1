"""RunSummary: what a run is about to do, and what it has done."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dream_trainer.callbacks.callback import Callback
from dream_trainer.callbacks.overview import overview, print_overview
from dream_trainer.callbacks.pace import duration_in_words
from dream_trainer.callbacks.screen import new_console
from dream_trainer.data import ResumableLoader
from dream_trainer.errors import ConfigError
from dream_trainer.loggers import LOG_NAME

if TYPE_CHECKING:
    from rich.console import Console

    from dream_trainer.trainer.base import BaseTrainer


class RunSummary(Callback):
    """Says on rank 0 what `fit` is about to do, and at its end what it has done.

    Args:
        depth: levels of modules below each model.
        min_steps: a run of fewer steps gets one line at its start and one at its end.
        console: where to print.

    Raises:
        ConfigError: a number is negative.
    """

    def __init__(self, depth: int = 1, min_steps: int = 50, console: Console | None = None) -> None:
        problems = [
            f"{name} is {value}, and must be 0 or more"
            for name, value in (("depth", depth), ("min_steps", min_steps))
            if value < 0
        ]
        if problems:
            raise ConfigError("RunSummary", problems, "RunSummary(depth=1) is the default.")
        self.depth, self.min_steps, self._console = depth, min_steps, console
        self._reset()

    def _reset(self) -> None:
        self._ended: str | None = None
        self._seconds = 0.0
        self._num_steps = self.num_samples = self._first_batch = 0
        self._is_counted = True

    def pre_fit(self, trainer: BaseTrainer) -> None:
        """Say what comes."""
        self._reset()
        progress = trainer.progress
        self._seconds, self._num_steps = progress.seconds, progress.num_steps
        self._first_batch = progress.num_batches_in_epoch
        if not trainer.world.is_global_zero:
            return
        what = overview(trainer, _heading(trainer), self.depth)
        console = self._console or new_console()
        if what.num_steps is not None and what.num_steps < self.min_steps:
            console.print(what.line, highlight=False, markup=False, soft_wrap=True)
        else:
            print_overview(what, console)

    def post_train_epoch(self, trainer: BaseTrainer) -> None:
        """Count the samples of the epoch."""
        self._count_samples(trainer)

    def post_epoch(self, trainer: BaseTrainer) -> None:
        """The next epoch counts from its first batch."""
        self._first_batch = 0

    def post_fit(self, trainer: BaseTrainer) -> None:
        """The run has reached its end."""
        self._count_samples(trainer)
        self._ended = trainer.stop_reason or "done"

    def on_interrupt(self, trainer: BaseTrainer) -> None:
        """It was interrupted."""
        self._count_samples(trainer)
        self._ended = "interrupted"

    def on_exception(self, trainer: BaseTrainer, exception: BaseException) -> None:
        """It failed; what failed is told by the exception."""
        self._ended = "failed"

    def close(self, trainer: BaseTrainer) -> None:
        """Say what has been, now that it is saved."""
        if self._ended is None or not (trainer.is_fitting and trainer.world.is_global_zero):
            return
        lines = [end_line(trainer, self._ended)]
        if trainer.progress.num_steps >= self.min_steps:
            width = max(map(len, rows := self._rows(trainer)))
            lines += [f"  {label:<{width}}  {words}" for label, words in rows.items()]
        console = self._console or new_console()
        console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)
        self._ended = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_console": None}  # it has locks

    def _count_samples(self, trainer: BaseTrainer) -> None:
        """Add those of the epoch under way, as far as they are not counted."""
        loader, last = trainer.loop.train_loader, trainer.progress.num_batches_in_epoch
        dp_size = trainer.world.dp_size
        counts = [_num_samples(loader, one, dp_size) for one in (self._first_batch, last)]
        self._first_batch = last
        if None in counts:
            self._is_counted = False
        else:
            first, end = counts
            self.num_samples += max((end or 0) - (first or 0), 0)

    def _rows(self, trainer: BaseTrainer) -> dict[str, str]:
        rows = {"time": self._time(trainer)}
        progress = trainer.progress
        if results := trainer.validation_results:
            of = progress.last_validation_step
            at = "" if of == progress.num_steps else f" (of step {of})"
            words = "  ".join(f"{name} {value:.4g}" for name, value in results.items())
            rows["validation"] = f"{words}{at}"
        if not trainer.writes_run_directory:
            return rows
        directory, store = trainer.run_directory, trainer.checkpointer.store
        rules, newest = trainer.checkpoint_parameters, store.newest()
        if rules.monitor is not None and (best := store.best(rules.mode, rules.monitor)):
            value = best.manifest.monitored_value
            at = f"at step {best.manifest.step}: {best.path.relative_to(directory)}"
            rows["best"] = f"{rules.monitor} {value:.4g} {at}"
        if newest is not None:
            rows["newest"] = str(newest.path.relative_to(directory))
        if (log := directory / LOG_NAME).exists():
            rows["log"] = log.name
        rows["view"] = f"dream-trainer report {directory}"
        return rows

    def _time(self, trainer: BaseTrainer) -> str:
        progress = trainer.progress
        seconds, steps = progress.seconds - self._seconds, progress.num_steps - self._num_steps
        words = [duration_in_words(seconds)]
        if steps != progress.num_steps:
            words = [f"{words[0]}, of {duration_in_words(progress.seconds)} with earlier starts"]
        if steps and seconds > 0:
            words.append(f"{steps / seconds:,.3g} steps/s")
            if self._is_counted:
                words.append(f"{self.num_samples / seconds:,.0f} samples/s")
        return ", ".join(words)


def end_line(trainer: BaseTrainer, ended: str) -> str:
    """Why a run has ended, how far it has come, and where it is.

    Args:
        trainer: at its end.
        ended: why.
    """
    place = f": {trainer.run_directory}" if trainer.writes_run_directory else ""
    return f"{ended} at {trainer.progress.place}{place}"


def _heading(trainer: BaseTrainer) -> str:
    if trainer.origin:
        return trainer.origin
    return f"{type(trainer).__name__}, nothing on disk"


def _num_samples(loader: ResumableLoader, num_batches: int, dp_size: int) -> int | None:
    """Samples over all ranks in the first batches of an epoch."""
    size, most = loader.batch_size, loader.num_samples_in_epoch
    if size is None or most is None:
        return None
    return min(num_batches * size * dp_size, most)


__all__ = ["RunSummary", "end_line"]
