"""Values that decide about a run: results of validations, means over training epochs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from dream_trainer.errors import ConfigError
from dream_trainer.metrics import Observations, merge_ranks, totals

if TYPE_CHECKING:
    from dream_trainer.trainer.base import BaseTrainer

_TRAIN = "train/"
#: Observations that are kept before they are moved; moving is a host synchronisation.
_MOST_PENDING = 50


class Monitored:
    """Knows values by name, the same on every rank. What nobody watches costs nothing.

    A name that begins with ``train/`` is the mean over the last training epoch of what
    ``training_step`` returned or logged, weighted as in the log, or else the result of a metric.
    Any other is a result of the last validation.

    Args:
        trainer: whose values.

    Attributes:
        is_watching: whether any mean over an epoch is wanted.
        means: of the last training epoch, the same on every rank.
    """

    def __init__(self, trainer: BaseTrainer) -> None:
        self._trainer = trainer
        self.is_watching = False
        self._names: set[str] = set()
        #: What there is besides, for messages.
        self._seen: set[str] = set()
        self._pending: Observations = []
        self._sums: dict[str, tuple[float, float]] = {}
        self.means: dict[str, float] = {}

    def watch(self, name: str) -> None:
        """Say before the run that a value will be asked for."""
        if name.startswith(_TRAIN):
            self.is_watching = True
            self._names.add(name)

    def start_epoch(self) -> None:
        """A training epoch begins."""
        self._pending, self._sums = [], {}

    def take_step(self) -> None:
        """Look at the values of a window that has ended, before anybody takes them away."""
        logged = self._trainer.logged
        self._pending += logged.named(self._names)
        if not self._seen:
            self._seen = logged.names()
        if len(self._pending) >= _MOST_PENDING:
            self._move()

    def finish_epoch(self) -> None:
        """The training batches are used up. A collective, on several ranks."""
        trainer = self._trainer
        self._move()
        self.means = merge_ranks(trainer.world.gather_data_parallel(self._sums))
        if self._names - self.means.keys():
            self.means = trainer.metrics.compute("train") | self.means

    def value(self, name: str, place: str) -> float:
        """The value of a name.

        Args:
            name: of a value that is watched.
            place: that asks for it, for the error.

        Raises:
            ConfigError: there is none.
        """
        of_epoch = name.startswith(_TRAIN)
        known = self.means if of_epoch else self._trainer.validation_results
        if name in known:
            return known[name]
        there = sorted(self._seen | known.keys() if of_epoch else known)
        what = "values of the training epoch" if of_epoch else "validation results"
        raise ConfigError(
            place,
            [f"monitor={name!r} is not among the {what} ({', '.join(there) or 'none'})"],
            "Monitor one of these, or log it.",
        )

    def state_dict(self) -> dict[str, Any]:
        """What the epoch has so far on this rank. Nothing if nobody watches."""
        if not self.is_watching:
            return {}
        return {"sums": dict(self._sums), "pending": [list(one) for one in self._pending]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        sums, pending = state_dict.get("sums", {}), state_dict.get("pending", ())
        self._sums = {name: (total, weight) for name, (total, weight) in sums.items()}
        self._pending = [(name, value, weight) for name, value, weight in pending]

    def totals_over_ranks(self) -> dict[str, tuple[float, float]]:
        """What the epoch has so far on all ranks together. A collective, if anybody watches."""
        if not self.is_watching:
            return {}
        parts = self._trainer.world.gather_data_parallel([self._sums, *self._pending_totals()])
        return _added(row for part in parts for row in part)

    def load_totals(self, totals_of_all: Mapping[str, tuple[float, float]]) -> None:
        """Go on from `totals_over_ranks` of other ranks: the first of these has them all."""
        is_first = self._trainer.world.dp_rank == 0
        self._sums, self._pending = dict(totals_of_all) if is_first else {}, []

    def _move(self) -> None:
        self._sums = _added([self._sums, *self._pending_totals()])
        self._pending = []

    def _pending_totals(self) -> list[dict[str, tuple[float, float]]]:
        rows = totals([one] for one in self._pending)
        if self._trainer.guard is None:
            return rows
        # A step that was left out brings its loss nevertheless.
        return [row for row in rows if all(math.isfinite(total) for total, _ in row.values())]


def _added(rows: Iterable[Mapping[str, tuple[float, float]]]) -> dict[str, tuple[float, float]]:
    sums: dict[str, tuple[float, float]] = {}
    for row in rows:
        for name, (total, weight) in row.items():
            before, weight_before = sums.get(name, (0.0, 0.0))
            sums[name] = before + total, weight_before + weight
    return sums
