"""CheckpointCallback: saves when the triggers of CheckpointParameters say so."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from dream_trainer.callbacks.callback import Callback
from dream_trainer.errors import CheckpointError
from dream_trainer.progress import reaches_multiple

if TYPE_CHECKING:
    from dream_trainer.trainer.base import BaseTrainer


class _Place(NamedTuple):
    """What tells two saves of a run apart."""

    num_batches: int
    num_steps: int
    epoch: int
    in_epoch: bool
    last_validation_step: int
    stop_reason: str | None


class BegunSave(NamedTuple):
    """A save that was begun."""

    name: str
    """Of the checkpoint's directory."""
    stall: float
    """Seconds for which the training waited."""


class CheckpointCallback(Callback):
    """Saves every n steps, epochs or minutes, and at the end of the run.

    A save that fails, on a full disk for example, is reported and the training goes on; the next
    trigger tries again. Only at the end of the run it is an error.

    Args:
        clock: seconds from any start; rank 0's decides for all.

    Attributes:
        begun: the last save, on its way to the disk or there.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.begun: BegunSave | None = None
        self._last_time = 0.0
        self._saved_at: _Place | None = None  # of the last attempt
        self._is_saved = False
        self._last_step = 0

    def pre_fit(self, trainer: BaseTrainer) -> None:
        """Start the clock."""
        self._last_time = self._clock()
        self._saved_at = self._place(trainer) if trainer.is_resumed else None
        self._is_saved = trainer.is_resumed
        self._last_step = trainer.global_step

    def post_validation_epoch(self, trainer: BaseTrainer, results: Mapping[str, float]) -> None:
        """Say so if the monitored value is not there."""
        monitor = trainer.checkpoint_parameters.monitor
        if monitor is not None and monitor not in results:
            warnings.warn(
                f"checkpoint_parameters.monitor={monitor!r} is not among the validation results "
                f"({', '.join(results) or 'none'}); no checkpoint counts as best.",
                stacklevel=2,
            )

    def save_again(self) -> None:
        """The state has changed where it was saved already, at the end of a run."""
        self._saved_at = None

    def on_boundary(self, trainer: BaseTrainer) -> None:
        """Save if a trigger is due."""
        if trainer.checkpointer.is_saving:
            trainer.checkpointer.report()
        if not self._is_due(trainer):
            return
        try:
            self._save(trainer)
        except CheckpointError as error:
            if trainer.world.is_global_zero:
                text = f"a checkpoint was not saved. {error}"
                warnings.warn(text, RuntimeWarning, stacklevel=2)

    def post_fit(self, trainer: BaseTrainer) -> None:
        """Save the end of the run, unless it is saved already."""
        if trainer.writes_run_directory:
            self._save_now(trainer)

    def on_interrupt(self, trainer: BaseTrainer) -> None:
        """Save, if the signal let the batch under way end, and if there was one."""
        is_asked_for = trainer.writes_run_directory and trainer.checkpoint_parameters.on_interrupt
        is_whole = trainer.is_interrupted_between_batches and trainer.progress.num_batches > 0
        if not (is_asked_for and is_whole and trainer.is_fitting):
            return
        self._save_now(trainer)
        trainer.world.print(f"saved at {trainer.progress.place}; the same command goes on")

    def _is_due(self, trainer: BaseTrainer) -> bool:
        parameters, progress = trainer.config.checkpoint_parameters, trainer.progress
        if not parameters.enable:
            return False
        is_due, last, every_steps = False, self._saved_at, parameters.every_n_steps
        before, self._last_step = self._last_step, progress.num_steps
        if every_steps is not None and reaches_multiple(
            progress.num_steps, every_steps, after=before
        ):
            is_due = last is None or last.num_steps != progress.num_steps
        if not progress.in_epoch and parameters.every_n_epochs is not None:
            is_due |= progress.epoch % parameters.every_n_epochs == 0
        if parameters.after_validation:
            validated = progress.last_validation_step
            is_due |= validated == progress.num_steps and (
                last is None or last.last_validation_step != validated
            )
        if parameters.every_n_minutes is not None:
            # Ranks' clocks differ; acting on their own they would wait for each other for ever.
            # Costs a broadcast per step, with this trigger only.
            passed = self._clock() - self._last_time
            is_due |= trainer.world.broadcast(passed >= 60 * parameters.every_n_minutes)
        return is_due and self._saved_at != self._place(trainer)

    def _save_now(self, trainer: BaseTrainer) -> None:
        """Return once this place is saved."""
        trainer.place.enter("save")
        # Awaited: a failure that only some ranks know of yet would let only those save again.
        is_committed = trainer.checkpointer.report(wait=True) and self._is_saved
        if not is_committed or self._saved_at != self._place(trainer):
            self._save(trainer)
            trainer.checkpointer.wait()

    def _save(self, trainer: BaseTrainer) -> None:
        self._saved_at, self._is_saved = self._place(trainer), False
        self._last_time, began = self._clock(), time.perf_counter()
        monitor, value = trainer.checkpoint_parameters.monitor, None
        if monitor is not None and trainer.progress.last_validation_step == trainer.global_step:
            value = trainer.validation_results.get(monitor)
        path = trainer.checkpointer.save(
            trainer.checked_state_dict(),
            step=trainer.global_step,
            epoch=trainer.current_epoch,
            monitored=None if value is None else float(value),
            optimizers=trainer.components.optimizers.values(),
        )
        self._is_saved = True
        self.begun = BegunSave(path.name, time.perf_counter() - began)

    def _place(self, trainer: BaseTrainer) -> _Place:
        progress = trainer.progress
        return _Place(
            progress.num_batches,
            progress.num_steps,
            progress.epoch,
            progress.in_epoch,
            progress.last_validation_step,
            trainer.stop_reason,
        )
