"""Values that decide about a run: results of validations, means over training epochs."""

from __future__ import annotations

from collections.abc import Mapping
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
        self._pending += self._trainer.logged.named(self._names)
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
        if name not in known:
            raise ConfigError(place, [missing(name, known)], "Monitor one of these, or log it.")
        return known[name]

    def state_dict(self) -> dict[str, Any]:
        """What the epoch has so far; differs by rank. Nothing if nobody watches."""
        if not self.is_watching:
            return {}
        return {"sums": dict(self._sums), "pending": [list(one) for one in self._pending]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        sums, pending = state_dict.get("sums", {}), state_dict.get("pending", ())
        self._sums = {name: (total, weight) for name, (total, weight) in sums.items()}
        self._pending = [(name, value, weight) for name, value, weight in pending]

    def _move(self) -> None:
        (row,) = totals([self._pending])
        self._pending = []
        for name, (total, weight) in row.items():
            before, weight_before = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = before + total, weight_before + weight


def missing(name: str, known: Mapping[str, float]) -> str:
    """The problem that a value is not there."""
    what = "values of the training epoch" if name.startswith(_TRAIN) else "validation results"
    return f"monitor={name!r} is not among the {what} ({', '.join(sorted(known)) or 'none'})"
