"""ProgressBar: where the run is, on the terminal or line by line in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from dream_trainer.callbacks.callback import Callback
from dream_trainer.lazy_names import loading

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

    from dream_trainer.trainer.base import BaseTrainer


class ProgressBar(Callback):
    """A bar on a terminal; elsewhere a line every few seconds. Only rank 0 draws.

    Args:
        seconds_per_line: least time between two lines where there is no terminal.
        console: where to draw.
        clock: seconds from any start.
    """

    def __init__(
        self,
        seconds_per_line: float = 10.0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._seconds_per_line, self._clock = seconds_per_line, clock
        self._console = console or _new_console()
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._is_drawing = False
        self._last_line = self._last_draw = 0.0
        self._results: Mapping[str, float] = {}

    def pre_fit(self, trainer: BaseTrainer) -> None:
        """Say what is about to run, and open the bar."""
        self._is_drawing = trainer.world.is_global_zero
        self._last_line = self._clock()
        if not self._is_drawing:
            return
        if self._console.is_terminal:
            self._bar = _new_bar(self._console)
            self._bar.start()

    def post_train_step(
        self, trainer: BaseTrainer, result: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move on, a few times a second at most."""
        if not self._is_drawing:
            return
        now = self._clock()
        if self._bar is not None and now - self._last_draw > 0.1:
            self._last_draw = now
            self._draw(trainer, batch_idx + 1)
        elif self._bar is None and now - self._last_line > self._seconds_per_line:
            self._line(trainer, f"step {trainer.global_step}, batch {batch_idx + 1}")

    def post_validation_epoch(self, trainer: BaseTrainer, results: Mapping[str, float]) -> None:
        """Show the results."""
        self._results = results
        if self._is_drawing and trainer.is_fitting and self._bar is None:
            self._line(trainer, f"step {trainer.global_step}")

    def post_epoch(self, trainer: BaseTrainer) -> None:
        """Turn the epoch's bar into a line: a long run would fill the screen with bars."""
        if self._bar is not None:
            self._draw(trainer, trainer.progress.num_batches_in_epoch)
            self._bar.refresh()
            self._line(trainer, f"step {trainer.global_step}")
            assert self._task is not None
            self._bar.remove_task(self._task)
            self._task = None

    def close(self, trainer: BaseTrainer) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._task = None

    def _draw(self, trainer: BaseTrainer, num_batches: int) -> None:
        assert self._bar is not None
        if self._task is None:
            self._task = self._bar.add_task("", total=trainer.num_train_batches, metrics="")
        self._bar.update(
            self._task,
            completed=num_batches,
            description=_title(trainer),
            metrics=_words(self._results),
        )

    def _line(self, trainer: BaseTrainer, where: str) -> None:
        self._last_line = self._clock()
        self._console.print(
            f"{_title(trainer)}, {where}  {_words(self._results)}", highlight=False, soft_wrap=True
        )


def _new_console() -> Console:
    with loading():
        from rich.console import Console

    return Console()


def _new_bar(console: Console) -> Progress:
    with loading():
        from rich import progress

    return progress.Progress(
        progress.TextColumn("[bold]{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[metrics]}"),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
        console=console,
    )


def _title(trainer: BaseTrainer) -> str:
    n_epochs = trainer.training_parameters.n_epochs
    number = trainer.current_epoch + 1
    return f"epoch {number}/{n_epochs}" if n_epochs else f"epoch {number}"


def _words(results: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in results.items())
