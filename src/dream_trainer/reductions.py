"""Means, sums, maxima and minima over batches and ranks, without a host synchronisation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from dream_trainer.host_values import Value, to_host

Reduce = Literal["mean", "sum", "max", "min"]
#: One rank's: name -> reduction, number, weight.
Parts = Mapping[str, tuple[str, float, float]]
_NAMES = {
    torch.mean: "mean",
    torch.sum: "sum",
    sum: "sum",
    torch.max: "max",
    max: "max",
    torch.min: "min",
    min: "min",
}


def reduction(given: Any) -> str:
    """Its name.

    Raises:
        ValueError: it is another function, which cannot be taken batch by batch.
    """
    name = given if isinstance(given, str) else _NAMES.get(given)
    name = {"avg": "mean", "average": "mean"}.get(str(name).lower(), str(name).lower())
    if name not in ("mean", "sum", "max", "min"):
        raise ValueError(
            f'reduce_fx={given!r} is not supported; use "mean", "sum", "max" or "min", or log a '
            "torchmetrics.Metric"
        )
    return name


@dataclass
class _Entry:
    reduce: str
    value: Value
    weight: float


class ReducedValues:
    """Means, sums, maxima and minima by name. Adding costs no host synchronisation."""

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}

    def __bool__(self) -> bool:
        return bool(self._entries)

    def add(self, name: str, value: Value, weight: float, reduce: str) -> None:
        """Take in the value of a batch.

        Args:
            name: of the result.
            value: a number, or a tensor with one element.
            weight: how much it counts in a mean.
            reduce: see `reduction`.

        Raises:
            ValueError: the name was reduced in another way before.
        """
        if isinstance(value, Tensor):
            value = value.detach()
            # On the CPU there is nothing to wait for, and Python's numbers have twice the digits.
            value = value.item() if value.is_cpu else value.double().reshape(())
        if reduce == "mean":
            value = value * weight
        known = self._entries.get(name)
        if known is None:
            self._entries[name] = _Entry(reduce, value, weight)
            return
        if known.reduce != reduce:
            raise ValueError(
                f"{name} is logged as a {known.reduce} and as a {reduce}; give one another name"
            )
        known.weight += weight
        known.value = _together(reduce, known.value, value)

    def results(self, gather: Callable[[Any], list[Any]]) -> dict[str, float]:
        """Over all ranks.

        Args:
            gather: gives every rank the values of all of them.
        """
        (own,) = parts_of([self])
        return merged(gather(own))

    def state_dict(self) -> dict[str, Any]:
        """This rank's."""
        return {name: asdict(entry) for name, entry in self._entries.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self._entries = {name: _Entry(**entry) for name, entry in state.items()}


def parts_of(many: Sequence[ReducedValues | None]) -> list[Parts]:
    """What ranks tell each other of each. One transfer, a host synchronisation."""
    entries = [{} if one is None else one._entries for one in many]
    numbers = iter(to_host([entry.value for one in entries for entry in one.values()]))
    return [
        {name: (entry.reduce, next(numbers), entry.weight) for name, entry in one.items()}
        for one in entries
    ]


def merged(parts: Iterable[Parts]) -> dict[str, float]:
    """Results by name, of the parts of all ranks."""
    found: dict[str, tuple[str, float, float]] = {}
    for part in parts:
        for name, (reduce, value, weight) in part.items():
            if name in found:
                _, before, weight_before = found[name]
                value = float(_together(reduce, before, value))
                weight += weight_before
            found[name] = (reduce, value, weight)
    return {
        name: value / weight if reduce == "mean" else value
        for name, (reduce, value, weight) in found.items()
        if weight or reduce != "mean"
    }


def _together(reduce: str, one: Value, other: Value) -> Value:
    if reduce in ("mean", "sum"):
        return one + other
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        pair = (torch.as_tensor(one), torch.as_tensor(other))
        return torch.maximum(*pair) if reduce == "max" else torch.minimum(*pair)
    # As torch does it; Python's own would keep or lose a NaN by the order.
    for value in (one, other):
        if value != value:
            return value
    return max(one, other) if reduce == "max" else min(one, other)
