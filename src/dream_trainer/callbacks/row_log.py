"""RowLog: rows of logged values on their way into the exact JSONL log and any logger."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dream_trainer.callbacks.rank_means import RankMeans
from dream_trainer.loggers import JsonlLog, Logger
from dream_trainer.metrics import Observations
from dream_trainer.reductions import ReducedValues

if TYPE_CHECKING:
    from dream_trainer.world import DreamWorld

#: Rows in the file that a failing disk may have lost, and that can be written again.
_MOST_UNSYNCED = 10_000


class RowLog:
    """Keeps rows until a flush, which moves, averages and writes all of them at once.

    Values stay on the device until then. When a flush happens does not change what is written.
    """

    def __init__(self) -> None:
        self._pending: list[tuple[int, int, Observations]] = []
        self._others: dict[int, ReducedValues] = {}
        self._means = RankMeans()
        self._log: JsonlLog | None = None
        self._size = self._crc32 = 0
        self._unwritten: list[dict[str, Any]] = []
        self._unsynced: list[dict[str, Any]] = []

    def __len__(self) -> int:
        return len(self._pending)

    def open(self, path: Path | None, *, goes_on: bool) -> None:
        """Open the log, and cut what a killed run wrote after its last checkpoint.

        Args:
            path: of the file; None where this rank writes none.
            goes_on: whether the run was continued.
        """
        if path is None:
            self._size = self._crc32 = 0
            self._unwritten = []
            return
        self._unsynced = []
        self._log = JsonlLog(path)
        if not goes_on:
            self._log.start_afresh()
        elif not self._log.resume(self._size, self._crc32):
            self._size = self._crc32 = 0

    def add(
        self, step: int, epoch: int, values: Observations, reduced: ReducedValues | None = None
    ) -> None:
        """Add a row, on every rank; one that is empty on all of them is not written."""
        if reduced is not None:
            self._others[len(self._pending)] = reduced
        self._pending.append((step, epoch, values))

    def flush(self, world: DreamWorld, loggers: Iterable[Logger] = ()) -> list[dict[str, Any]]:
        """Move, average and write what is pending. On every rank; a host synchronisation.

        Returns:
            The rows, on every rank the same.
        """
        if not self._pending:
            return []
        pending, self._pending = self._pending, []
        reduced, self._others = self._others, {}
        others = [reduced.get(index) for index in range(len(pending))] if reduced else None
        logged = self._means.of([row for _, _, row in pending], world, others)
        rows: list[dict[str, Any]] = [
            {"step": step, "epoch": epoch, **row}
            for (step, epoch, _), row in zip(pending, logged, strict=True)
            if row
        ]
        if self._log is not None:
            self._write(self._log, rows)
        for logger in loggers if world.is_global_zero else ():
            for row in rows:
                metrics = {k: v for k, v in row.items() if k not in ("step", "epoch")}
                logger.log_metrics(metrics | {"epoch": row["epoch"]}, step=row["step"])
        return rows

    def sync(self) -> None:
        """Make what was flushed survive a power cut, for a checkpoint that is taken now."""
        if self._log is not None:
            self._write(self._log, [], sync=True)

    def close(self) -> None:
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

    def state_dict(self) -> dict[str, Any]:
        """Length of the log after `sync`, and what a full disk has no place for."""
        return {"size": self._size, "crc32": self._crc32, "unwritten": list(self._unwritten)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Remember where `open` is to cut the log."""
        self._size, self._crc32 = state_dict["size"], state_dict["crc32"]
        self._unwritten = list(state_dict["unwritten"])
        self._pending.clear()
        self._others.clear()

    def _write(self, log: JsonlLog, rows: list[dict[str, Any]], sync: bool = False) -> None:
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


__all__ = ["RowLog"]
