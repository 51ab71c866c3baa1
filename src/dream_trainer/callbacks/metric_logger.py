"""MetricLogger: what the steps return and log, into the exact JSONL log and any logger."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dream_trainer.callbacks.callback import Callback
from dream_trainer.callbacks.rank_means import RankMeans
from dream_trainer.errors import NonFiniteError
from dream_trainer.loggers import JsonlLog, purge_after
from dream_trainer.metrics import Observations

if TYPE_CHECKING:
    from dream_trainer.trainer.base import BaseTrainer

#: Rows in the file that a failing disk may have lost, and that can be written again.
_MOST_UNSYNCED = 10_000
_WATCHED = ("train/loss", "train/grad_norm")


class MetricLogger(Callback):
    """Writes a row per logged step, epoch and validation.

    Values stay on the device until a flush, which moves all of them at once and averages over
    ranks; when the flush happens does not change what is written. A loss or gradient norm that
    is not finite raises there.

    Args:
        every_n_steps: log every n-th step.
        flush_every_n_rows: rows kept before they are moved and written.

    Raises:
        NonFiniteError: at a flush, naming the step.
    """

    def __init__(self, every_n_steps: int = 1, flush_every_n_rows: int = 50) -> None:
        self.every_n_steps = every_n_steps
        self.flush_every_n_rows = flush_every_n_rows
        self._pending: list[tuple[int, int, Observations]] = []
        self._means = RankMeans()
        self._log: JsonlLog | None = None
        self._size = self._crc32 = 0
        self._unwritten: list[dict[str, Any]] = []
        self._unsynced: list[dict[str, Any]] = []
        self._last_validation_step = self._last_train_epoch = -1

    def pre_fit(self, trainer: BaseTrainer) -> None:
        """Open the logs and cut what a killed run wrote after its last checkpoint."""
        if not (trainer.world.is_global_zero and trainer.writes_run_directory):
            self._size = self._crc32 = 0
            self._unwritten = []
            return
        self._unsynced = []
        self._log = JsonlLog(trainer.run_directory / "metrics.jsonl")
        if not trainer.progress.num_batches:
            self._log.start_afresh()
            return
        if not self._log.resume(self._size, self._crc32):
            self._size = self._crc32 = 0
        for logger in trainer.loggers.values():
            purge_after(logger, trainer.global_step)

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
        if self._log is not None:
            self._write_log(self._log, [], sync=True)

    def post_train_step(
        self, trainer: BaseTrainer, result: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take the values of a finished step."""
        if trainer.window.is_accumulating:
            return
        self._take_step(trainer)
        if len(self._pending) >= self.flush_every_n_rows:
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
        if values := trainer.logged.take():
            self._add_row(trainer, values)

    def post_fit(self, trainer: BaseTrainer) -> None:
        """Write the last rows; nothing else does in a run that ends inside an epoch unsaved."""
        self.flush(trainer)

    def close(self, trainer: BaseTrainer) -> None:
        """Close the log.

        Raises:
            OSError: rows are left that cannot be written.
        """
        if self._log is not None:
            log, self._log = self._log, None
            unwritten, self._unwritten = self._unwritten, []
            try:
                log.write(unwritten)
                log.sync()
                self._size, self._crc32 = log.size, log.crc32
            finally:
                log.close()

    def flush(self, trainer: BaseTrainer) -> None:
        """Move, average and write what is pending. On every rank; a host synchronisation."""
        if not self._pending:
            return
        pending, self._pending = self._pending, []
        logged = self._means.of([row for _, _, row in pending], trainer.world)
        rows = [
            {"step": step, "epoch": epoch, **row}
            for (step, epoch, _), row in zip(pending, logged, strict=True)
        ]
        self._write(trainer, rows)
        # A loss scale that is too large makes norms overflow; such steps are skipped as meant.
        watched = _WATCHED[:1] if trainer.world.scales_loss else _WATCHED
        for row in rows:
            for name in watched:
                if not math.isfinite(row.get(name, 0.0)):
                    raise NonFiniteError(
                        f"{name} is {row[name]} at step {row['step']} (epoch {row['epoch']}). "
                        "Lower the learning rate, set gradient_clip_val, or set "
                        "detect_anomaly=True to find the operation."
                    )

    def state_dict(self) -> dict[str, Any]:
        """Length of the log after `collect`, and the last epoch and validation in it."""
        return {
            "size": self._size,
            "crc32": self._crc32,
            "unwritten": list(self._unwritten),
            "last_train_epoch": self._last_train_epoch,
            "last_validation_step": self._last_validation_step,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Remember where to cut the log."""
        self._size, self._crc32 = state_dict["size"], state_dict["crc32"]
        self._unwritten = list(state_dict["unwritten"])
        self._last_train_epoch = state_dict["last_train_epoch"]
        self._last_validation_step = state_dict["last_validation_step"]
        self._pending.clear()

    def _take_step(self, trainer: BaseTrainer) -> None:
        values = trainer.logged.take()
        if values and trainer.progress.num_steps % self.every_n_steps == 0:
            self._add_row(trainer, values)

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

    def _write(self, trainer: BaseTrainer, rows: list[dict[str, Any]]) -> None:
        if not trainer.world.is_global_zero:
            return
        if self._log is not None:
            self._write_log(self._log, rows)
        for logger in trainer.loggers.values():
            for row in rows:
                metrics = {k: v for k, v in row.items() if k not in ("step", "epoch")}
                logger.log_metrics(metrics | {"epoch": row["epoch"]}, step=row["step"])

    def _write_log(self, log: JsonlLog, rows: list[dict[str, Any]], sync: bool = False) -> None:
        """Rows that a full disk has no place for are written with later ones."""
        was_full = bool(self._unwritten)
        self._unwritten += rows
        try:
            log.write(self._unwritten)
            self._unsynced += self._unwritten
            self._unwritten = []
            if sync or len(self._unsynced) >= _MOST_UNSYNCED:
                log.sync()
                self._unsynced = []
                self._size, self._crc32 = log.size, log.crc32
        except OSError as error:
            if not self._unwritten:  # the disk may not have what the file shows
                log.go_back()
                self._unwritten, self._unsynced = self._unsynced, []
            if not was_full:
                text = f"rows of {log.path} are kept in memory until they can be written: {error}"
                warnings.warn(text, RuntimeWarning, stacklevel=2)

    def _add_row(self, trainer: BaseTrainer, values: Observations) -> None:
        progress = trainer.progress
        self._pending.append((progress.num_steps, progress.epoch, values))


def _exact(results: Mapping[str, float]) -> Observations:
    return [(name, value, 1.0) for name, value in results.items()]
