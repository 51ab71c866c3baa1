"""ProgressBar: where the run is, on the terminal, in a notebook or line by line in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from dream_trainer.callbacks.callback import Callback
from dream_trainer.callbacks.metric_logger import MetricLogger
from dream_trainer.callbacks.pace import Pace, duration_in_words, rate_in_words
from dream_trainer.callbacks.screen import Bar, Screen, new_console, open_screen
from dream_trainer.errors import ConfigError
from dream_trainer.metrics import ArrivingValues
from dream_trainer.world.sharded import is_dtensor

if TYPE_CHECKING:
    from rich.console import Console

    from dream_trainer.trainer.base import BaseTrainer

#: Seconds between two drawings, and those that a pace looks back.
_REDRAW, _WINDOW = 0.2, 30.0
_AT_ONCE = float("-inf")
_DEFAULT_METRICS = ("train/loss", "val/*")
#: Names in a row that are no values.
_PLACE = ("step", "epoch")


class ProgressBar(Callback):
    """Bars on a terminal and in a notebook; elsewhere a line every few seconds. Rank 0 draws.

    It shows epoch, step, pace, time and some values, with the step that a value is of if it is not
    the one that was just taken. Values of training are what this rank logged in that step; they
    leave the device when something is drawn, and on CUDA nobody waits for them. Values that only
    others log, or only at an epoch's end, come from rows that `MetricLogger` has written.

    Args:
        metrics: names to show, with ``*`` and ``?`` for parts of them.
        seconds_per_line: least time between two lines where there is no terminal. A validation
            has a line in any case.
        console: where to draw.
        clock: seconds from any start.

    Raises:
        ConfigError: ``metrics`` is not made of names.
    """

    def __init__(
        self,
        metrics: Sequence[str] = _DEFAULT_METRICS,
        seconds_per_line: float = 10.0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.metrics = (metrics,) if isinstance(metrics, str) else tuple(metrics)
        if wrong := [one for one in self.metrics if not isinstance(one, str)]:
            raise ConfigError(
                "ProgressBar.metrics",
                [f"{one!r} is a {type(one).__name__}" for one in wrong],
                'Give names, metrics=["train/loss", "val/*"].',
            )
        self._seconds_per_line, self._clock, self._console = seconds_per_line, clock, console
        self._screen: Screen | None = None
        self._reset()

    def _reset(self) -> None:
        self._started = self._last_line = self._last_step = 0.0
        self._next = _AT_ONCE
        self._batches, self._steps = Pace(_WINDOW), Pace()
        self._evaluated = Pace(_WINDOW)
        self._is_evaluating = self._is_in_fit = False
        self._num_steps: int | None = None
        self._values: dict[str, tuple[float, int]] = {}
        self._results: dict[str, float] = {}
        self._results_step = -1
        self._arriving: tuple[int, ArrivingValues] | None = None
        self._log: MetricLogger | None = None

    # ------------------------------------------------------------------ training

    def pre_fit(self, trainer: BaseTrainer) -> None:
        """Find out how long the run is, and what is known of it already."""
        if not self._open(trainer):
            return
        # Not what the trainer says: a callback may evaluate in the middle of a fit.
        self._is_in_fit = True
        self._num_steps = _steps_of_run(trainer)
        self._log = next(iter(trainer.callbacks.of_kind(MetricLogger).values()), None)
        self._results = self._chosen(trainer.validation_results)
        self._results_step = trainer.progress.last_validation_step

    def post_train_step(
        self, trainer: BaseTrainer, result: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move on, a few times a second at most."""
        if self._screen is None:
            return
        self._last_step = now = self._clock()
        if now < self._next:
            return
        self._mark(trainer)
        if self._next == _AT_ONCE and not self._screen.has_bars:
            self._next = now + self._seconds_per_line
            return
        is_waiting = self._fetch(trainer)
        if self._screen.has_bars:
            self._next = now + _REDRAW
            self._screen.draw(self._bars(trainer, now), self._words(trainer))
        elif not is_waiting:  # else after the next step
            self._say(trainer, now)

    def post_validation_step(
        self, trainer: BaseTrainer, result: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move on."""
        self._evaluate(trainer, "validation", batch_idx)

    def post_validation_epoch(self, trainer: BaseTrainer, results: Mapping[str, float]) -> None:
        """Say the results."""
        self._end_evaluation(trainer)
        if self._screen is None or not trainer.is_fitting:
            return
        self._results, self._results_step = self._chosen(results), trainer.global_step
        # The results were waited for just now: what was logged before is there.
        self._fetch(trainer, waits=True)
        self._say(trainer, self._clock())

    def post_epoch(self, trainer: BaseTrainer) -> None:
        """Say something of an epoch without validation, if nothing was said for long."""
        if self._screen is not None and self._screen.has_bars:
            now = self._clock()
            if now - self._last_line >= self._seconds_per_line:
                self._say(trainer, now)

    # ------------------------------------------------------------------ test, predict

    def post_test_step(self, trainer: BaseTrainer, result: Any, batch: Any, batch_idx: int) -> None:
        """Move on."""
        self._evaluate(trainer, "test", batch_idx)

    def post_test_epoch(self, trainer: BaseTrainer, results: Mapping[str, float]) -> None:
        """Take the bar away."""
        self._end_evaluation(trainer)

    def post_predict_step(
        self, trainer: BaseTrainer, result: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move on."""
        self._evaluate(trainer, "predict", batch_idx)

    def post_predict_epoch(self, trainer: BaseTrainer, results: Sequence[Any]) -> None:
        """Take the bar away."""
        self._end_evaluation(trainer)

    # ------------------------------------------------------------------ the end

    def post_fit(self, trainer: BaseTrainer) -> None:
        """Take the bars away."""
        self._close()

    def on_interrupt(self, trainer: BaseTrainer) -> None:
        """Take the bars away, before others say what they do now."""
        self._close()

    def on_exception(self, trainer: BaseTrainer, exception: BaseException) -> None:
        """Likewise."""
        self._close()

    def close(self, trainer: BaseTrainer) -> None:
        """Likewise."""
        self._close()

    def __getstate__(self) -> dict[str, Any]:
        # A screen has locks; a rank that is started elsewhere opens its own.
        return {**vars(self), "_screen": None, "_console": None}

    # ------------------------------------------------------------------ inside

    def _open(self, trainer: BaseTrainer) -> bool:
        """Whether this rank draws."""
        if self._screen is None and trainer.world.is_global_zero:
            self._reset()
            self._screen = open_screen(self._console or new_console())
            self._started = self._last_line = self._clock()
        return self._screen is not None

    def _close(self) -> None:
        screen, self._screen = self._screen, None
        self._is_in_fit = False
        self._arriving = None  # it holds on to values on the device
        if screen is not None:
            screen.close()

    def _mark(self, trainer: BaseTrainer) -> None:
        self._batches.mark(self._last_step, trainer.progress.local_batches)
        self._steps.mark(self._last_step, trainer.progress.num_steps)

    def _evaluate(self, trainer: BaseTrainer, title: str, batch_idx: int) -> None:
        if not self._open(trainer):
            return
        assert self._screen is not None
        now = self._clock()
        if not self._is_evaluating:
            self._is_evaluating, self._evaluated = True, Pace(_WINDOW)
            self._evaluated.mark(now, batch_idx + 1)
            if not (self._screen.has_bars or self._is_in_fit):
                self._next = now + self._seconds_per_line
        if now < self._next:
            return
        self._evaluated.mark(now, batch_idx + 1)
        total = trainer.loop.evaluations.num_batches
        left = None if total is None else self._evaluated.seconds_for(total - batch_idx - 1)
        bar = Bar(
            title,
            "batch",
            batch_idx + 1,
            total,
            rate_in_words(self._evaluated.per_second, "batch", "batches"),
            _left(left),
        )
        if self._screen.has_bars:
            self._next = now + _REDRAW
            bars = [*self._bars(trainer, now), bar] if self._is_in_fit else [bar]
            self._screen.draw(bars, self._words(trainer))
        else:
            self._next = now + self._seconds_per_line
            where = f"{title} of step {trainer.global_step}, {_count(bar)}"
            self._screen.line("  ".join(filter(None, (where, bar.pace, bar.times))))

    def _end_evaluation(self, trainer: BaseTrainer) -> None:
        self._is_evaluating = False
        if not self._is_in_fit:
            self._close()
        elif self._screen is not None:
            self._mark(trainer)
            before, self._last_step = self._last_step, self._clock()
            self._batches.leave_out(self._last_step - before)

    def _fetch(self, trainer: BaseTrainer, *, waits: bool = False) -> bool:
        """Get what was logged off the device, or ask for it.

        Returns:
            Whether something is still on its way.
        """
        if self._log is not None:
            for name, found in self._log.latest.items():
                is_newer = found[1] > self._values.get(name, (0.0, -1))[1]
                if is_newer and name not in _PLACE and self._is_chosen(name):
                    self._values[name] = found
        if self._arriving is None and not trainer.is_accumulating_gradients:
            row = [
                one
                for one in trainer.logged.newest
                # Only all ranks together can read one that is divided.
                if self._is_chosen(one[0]) and not any(map(is_dtensor, one))
            ]
            self._arriving = trainer.global_step, ArrivingValues(row)
        if self._arriving is None:
            return False
        step, values = self._arriving
        if not (waits or values.are_here):
            return True
        self._arriving = None
        self._values |= {name: (value, step) for name, value in values.values().items()}
        return False

    def _say(self, trainer: BaseTrainer, now: float) -> None:
        assert self._screen is not None
        self._last_line = now
        if not self._screen.has_bars:
            self._next = now + self._seconds_per_line
        run, epoch = self._bars(trainer, now)
        place = [epoch.title, _count(run)]
        if trainer.progress.in_epoch and not trainer.progress.train_epoch_finished:
            place.append(_count(epoch))
        parts = [", ".join(place), self._words(trainer)]
        if not self._screen.has_bars:
            parts += [run.pace, run.times]
        self._screen.line("  ".join(filter(None, parts)))

    def _bars(self, trainer: BaseTrainer, now: float) -> list[Bar]:
        """Of the run and of the epoch under way."""
        progress, limits = trainer.progress, trainer.training_parameters
        left = left_of_epoch = None
        if self._num_steps is not None:
            left = self._steps.seconds_for(self._num_steps - progress.num_steps)
        if limits.max_time is not None:
            rest = max(limits.max_time - progress.seconds, 0.0)
            left = rest if left is None else min(left, rest)
        batches = _batches_of_epoch(trainer)
        if batches is not None:
            left_of_epoch = self._batches.seconds_for(batches - progress.num_batches_in_epoch)
        per_step = self._batches.per_second
        if per_step is not None:
            per_step /= trainer.window.size
        gone = f"{duration_in_words(now - self._started)} gone"
        return [
            Bar(
                "run",
                "step",
                progress.num_steps,
                self._num_steps,
                rate_in_words(per_step, "step", "steps"),
                ", ".join(filter(None, (gone, _left(left)))),
            ),
            Bar(
                _title(trainer),
                "batch",
                progress.num_batches_in_epoch,
                batches,
                times=_left(left_of_epoch),
            ),
        ]

    def _words(self, trainer: BaseTrainer) -> str:
        step = trainer.global_step
        groups: dict[int, list[str]] = {}
        for name, (value, of) in sorted(self._values.items(), key=lambda item: self._rank(item[0])):
            if name not in self._results:
                groups.setdefault(of, []).append(f"{name} {value:.4g}")
        for name, value in self._results.items():
            groups.setdefault(self._results_step, []).append(f"{name} {value:.4g}")
        return " | ".join(
            "  ".join(words) + ("" if of == step else f" (of step {of})")
            for of, words in groups.items()
        )

    def _is_chosen(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.metrics)

    def _rank(self, name: str) -> int:
        return next(i for i, one in enumerate(self.metrics) if fnmatchcase(name, one))

    def _chosen(self, results: Mapping[str, float]) -> dict[str, float]:
        return {name: value for name, value in results.items() if self._is_chosen(name)}


def _title(trainer: BaseTrainer) -> str:
    n_epochs = trainer.training_parameters.n_epochs
    number = trainer.current_epoch + 1
    return f"epoch {number}/{n_epochs}" if n_epochs else f"epoch {number}"


def _count(bar: Bar) -> str:
    return f"{bar.unit} {bar.done}" + ("" if bar.total is None else f"/{bar.total}")


def _left(seconds: float | None) -> str:
    return "" if seconds is None else f"{duration_in_words(seconds)} left"


def _steps_of_run(trainer: BaseTrainer) -> int | None:
    try:
        return trainer.num_training_steps
    except ConfigError:
        return None


def _batches_of_epoch(trainer: BaseTrainer) -> int | None:
    batches, size = trainer.num_train_batches, trainer.window.size
    limit = trainer.training_parameters.step_limit(batches, size)
    known = [one for one in (batches, None if limit is None else limit * size) if one is not None]
    return min(known, default=None)
