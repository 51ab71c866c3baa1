"""What a clock or a meter says of a run: beside the exact log, never in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from dream_trainer.host_values import Value
from dream_trainer.reductions import Reduce, ReducedValues, merged, parts_of

#: Given the seconds of training in the interval, values by name; None is no value.
Source = Callable[[float], Mapping[str, float | None]]


class MeasuredValues:
    """Values of the interval under way, on this rank. They are never part of a run's state."""

    def __init__(self) -> None:
        self._values = ReducedValues()
        self._sources: dict[str, Source] = {}

    def add(self, name: str, value: Value, reduce: Reduce = "mean") -> None:
        """Add a value to the interval.

        Args:
            name: of the value.
            value: a number, or a tensor with one element, which stays on the device until `take`.
            reduce: how those of an interval become one.
        """
        self._values.add(name, value, 1.0, reduce)

    def ask(self, name: str, source: Source) -> None:
        """Have a function asked at the end of every interval, in place of one of this name."""
        self._sources[name] = source

    @property
    def sources(self) -> list[str]:
        """Names of the functions that are asked."""
        return [*self._sources]

    def take(self, seconds: float) -> dict[str, float]:
        """End the interval. A host synchronisation where tensors were added.

        Args:
            seconds: of training in it, and of waiting for the loader.
        """
        values, self._values = self._values, ReducedValues()
        found = merged(parts_of([values]))
        for source in self._sources.values():
            found |= {name: value for name, value in source(seconds).items() if value is not None}
        return found
