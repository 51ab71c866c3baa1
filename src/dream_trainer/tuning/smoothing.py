"""Smoothing of a loss: a running average, and one that does not lag."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class RunningAverage:
    """Exponential average with the correction for its start (Kingma and Ba, 2015, section 3).

    Args:
        smoothing: weight of the past, from 0 to below 1.
    """

    def __init__(self, smoothing: float) -> None:
        self._smoothing, self._sum, self._weight = smoothing, 0.0, 0.0

    def add(self, value: float) -> float:
        """Take a value in; the average so far."""
        self._sum = self._smoothing * self._sum + (1 - self._smoothing) * value
        self._weight = self._smoothing * self._weight + (1 - self._smoothing)
        return self._sum / self._weight


def smoothed(values: Sequence[float], smoothing: float) -> list[float]:
    """Averages forwards and backwards, so that a fall stays where it is.

    A running average alone shows it ``smoothing / (1 - smoothing)`` values too late, and a rate
    read from that is too high.
    """
    forwards = _averages(values, smoothing)
    return _averages(forwards[::-1], smoothing)[::-1]


def _averages(values: Iterable[float], smoothing: float) -> list[float]:
    average = RunningAverage(smoothing)
    return [average.add(value) for value in values]
