"""MetricLogger: what the steps return and log, into the exact JSONL log and any logger."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from dream_trainer.callbacks.callback import Callback
from dream_trainer.callbacks.row_log import RowLog
from dream_trainer.errors import NonFiniteError
from dream_trainer.loggers import LOG_NAME, log_hyperparameters, log_outcome, purge_after
from dream_trainer.metrics import Observations
from dream_trainer.progress import reaches_multiple
from dream_trainer.reductions import ReducedValues

if TYPE_CHECKING:
    from dream_trainer.trainer.base import BaseTrainer

_WATCHED = ("train/loss", "train/grad_norm")


class MetricLogger(Callback):
    """Writes a row per logged step, epoch and validation.

    Values stay on the device until a flush, which moves all of them at once and averages over
    ranks; when the flush happens does not change what is written. A loss or gradient norm that
    is not finite raises there.

    Args:
        every_n_steps: log every n-th step.
        flush_every_n_rows: rows kept before they are moved and written.

    Attributes:
        latest: the last value written under each name, and the step of its row.

    Raises:
        NonFiniteError: at a flush, naming the step.
    """

    def __init__(self, every_n_steps: int = 1, flush_every_n_rows: int = 50) -> None:
        self.every_n_steps = every_n_steps
        self.flush_every_n_rows = flush_every_n_rows
        self.latest: dict[str, tuple[float, int]] = {}
        self._rows = RowLog()
        self._last_validation_step = self._last_train_epoch = -1
        self._last_step = 0
        self._batches: dict[int, int] = {}
        self._has_outcome = False
        self._hyperparameters: dict[str, Any] = {}

    def pre_fit(self, trainer: BaseTrainer) -> None:
        """Open the logs and cut what a killed run wrote after its last checkpoint."""
        writes = trainer.world.is_global_zero and trainer.writes_run_directory
        goes_on = trainer.progress.num_batches > 0
        self._last_step = trainer.global_step
        self._rows.open(trainer.run_directory / LOG_NAME if writes else None, goes_on=goes_on)
        for logger in trainer.loggers.values() if writes and goes_on else ():
            purge_after(logger, trainer.global_step)
        self._has_outcome, self._hyperparameters = False, {}
        if trainer.loggers and trainer.world.is_global_zero:
            self._hyperparameters = trainer.hyperparameters()
            for logger in trainer.loggers.values():
                log_hyperparameters(logger, self._hyperparameters)

    def collect(self, trainer: BaseTrainer) -> None:
        """Write all rows of what is finished, for a checkpoint that is taken now. Collective.

        In a hook that this callback has not been called for yet, a row would be in no log: it is
        neither pending, nor does the hook come again after a restart.
        """
        if not trainer.progress.num_batches_in_window:
            self._take_step(trainer)
        self._take_train_epoch(trainer)
        self._take_validation(trainer)
        self.flush(trainer)
        self._rows.sync()

    def post_train_step(
        self, trainer: BaseTrainer, result: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take the values of a finished step."""
        if trainer.window.is_accumulating:
            return
        self._take_step(trainer)
        if len(self._rows) >= self.flush_every_n_rows:
            self.flush(trainer)

    def post_train_epoch(self, trainer: BaseTrainer) -> None:
        """Add the metrics of the training epoch."""
        self._take_train_epoch(trainer)
        self.flush(trainer)

    def post_validation_epoch(self, trainer: BaseTrainer, results: Mapping[str, float]) -> None:
        """Add the results of a validation that belongs to the run."""
        if trainer.is_fitting:
            self._take_validation(trainer)
            self.flush(trainer)

    def on_boundary(self, trainer: BaseTrainer) -> None:
        """Write what was logged after the step, in the hooks of a validation or an epoch."""
        values = trainer.logged.take()
        if values or trainer.logged.reduced is not None:
            self._add_row(trainer, values, trainer.logged.take_reduced())

    def post_fit(self, trainer: BaseTrainer) -> None:
        """Write the last rows; nothing else does in a run that ends inside an epoch unsaved."""
        self.flush(trainer)
        self._has_outcome = bool(trainer.progress.local_batches and trainer.validation_results)

    def close(self, trainer: BaseTrainer) -> None:
        """Close the log; tell the loggers what came of the run.

        Raises:
            OSError: rows are left that cannot be written.
        """
        if self._has_outcome and self._hyperparameters:
            outcome = _outcome(trainer)  # the last checkpoint is there by now
            for logger in trainer.loggers.values():
                log_outcome(logger, self._hyperparameters, outcome, trainer.global_step)
        self._has_outcome = False
        self._rows.close()

    def flush(self, trainer: BaseTrainer) -> None:
        """Move, average and write what is pending. On every rank; a host synchronisation."""
        rows = self._rows.flush(trainer.world, trainer.loggers.values())
        # A loss scale that is too large makes norms overflow; such steps are skipped as meant.
        watched = _WATCHED[:1] if trainer.world.scales_loss else _WATCHED
        self._keep_latest(rows)
        batches, self._batches = self._batches, {}
        if trainer.training_parameters.on_nonfinite == "skip":
            return
        for row in rows:
            for name in watched:
                if not math.isfinite(row.get(name, 0.0)):
                    _raise_nonfinite(trainer, row, name, batches.get(row["step"]))

    def state_dict(self) -> dict[str, Any]:
        """Length of the log after `collect`, and the last epoch and validation in it."""
        return {
            **self._rows.state_dict(),
            "last_train_epoch": self._last_train_epoch,
            "last_validation_step": self._last_validation_step,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Remember where to cut the log."""
        self._rows.load_state_dict(state_dict)
        self._last_train_epoch = state_dict["last_train_epoch"]
        self._last_validation_step = state_dict["last_validation_step"]

    def _keep_latest(self, rows: Sequence[Mapping[str, Any]]) -> None:
        found: dict[str, tuple[float, int]] = {}
        for row in reversed(rows):
            if not row.keys() <= found.keys():  # most rows have the names of the one after them
                for name, value in row.items():
                    found.setdefault(name, (value, row["step"]))
        self.latest |= found

    def _take_step(self, trainer: BaseTrainer) -> None:
        logged, step = trainer.logged, trainer.progress.num_steps
        values = logged.take()
        reduced = None if logged.reduced is None else logged.take_reduced()
        before, self._last_step = self._last_step, step
        is_row = values or reduced is not None or trainer.world.size > 1
        if is_row and reaches_multiple(step, self.every_n_steps, after=before):
            self._batches[step] = trainer.progress.num_batches_in_epoch - 1
            self._add_row(trainer, values, reduced)

    def _take_train_epoch(self, trainer: BaseTrainer) -> None:
        progress = trainer.progress
        if not progress.train_epoch_finished or progress.epoch == self._last_train_epoch:
            return
        self._last_train_epoch = progress.epoch
        if results := trainer.metrics.compute("train"):
            self._add_row(trainer, _exact(results))

    def _take_validation(self, trainer: BaseTrainer) -> None:
        step = trainer.progress.last_validation_step
        if step != self._last_validation_step:
            self._last_validation_step = step
            self._add_row(trainer, _exact(trainer.validation_results))

    def _add_row(
        self, trainer: BaseTrainer, values: Observations, reduced: ReducedValues | None = None
    ) -> None:
        progress = trainer.progress
        self._rows.add(progress.num_steps, progress.epoch, values, reduced)


def _raise_nonfinite(
    trainer: BaseTrainer, row: Mapping[str, Any], name: str, batch: int | None
) -> NoReturn:
    where = f"epoch {row['epoch']}" + ("" if batch is None else f", batch {batch}")
    bad = trainer.first_nonfinite()
    followed = "" if bad is None else f"; {bad} is not finite by now"
    raise NonFiniteError(
        f"{name} is {row[name]} at step {row['step']} ({where}){followed}. Lower the learning "
        "rate, set gradient_clip_val, set detect_anomaly=True to find the operation, or leave out "
        'such steps with on_nonfinite="skip".'
    )


def _outcome(trainer: BaseTrainer) -> dict[str, float]:
    """The last results, and the best monitored value: apart from the curves of these names."""
    outcome = {f"final/{name}": value for name, value in trainer.validation_results.items()}
    parameters = trainer.checkpoint_parameters
    if parameters.monitor is not None and trainer.writes_run_directory:
        best = trainer.checkpointer.store.best(parameters.mode, parameters.monitor)
        if best is not None and (value := best.manifest.monitored_value) is not None:
            outcome[f"best/{parameters.monitor}"] = value
    return outcome


def _exact(results: Mapping[str, float]) -> Observations:
    return [(name, value, 1.0) for name, value in results.items()]
