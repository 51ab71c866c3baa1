"""Values of ``self.log`` that are reduced over the batches of an epoch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from dream_trainer.metrics import Value, to_host

#: One rank's number and what it weighs.
Part = tuple[str, float, float]
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


class EpochValues:
    """Sums, maxima and minima by name. Adding costs no host synchronisation."""

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}

    def add(self, name: str, value: Value, weight: float, reduce: str) -> None:
        """Take in the value of a batch.

        Args:
            name: of the result.
            value: a number, or a tensor with one element.
            weight: how much it counts in a mean.
            reduce: see `reduction`.
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
        known.weight += weight
        known.value = _together(reduce, known.value, value)

    def results(self, gather: Callable[[Any], list[Any]]) -> dict[str, float]:
        """Over all ranks.

        Args:
            gather: gives every rank the values of all of them.
        """
        entries = self._entries
        numbers = to_host([entry.value for entry in entries.values()])
        own: dict[str, Part] = {
            name: (entry.reduce, number, entry.weight)
            for (name, entry), number in zip(entries.items(), numbers, strict=True)
        }
        found: dict[str, Part] = {}
        for part in gather(own):
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

    def state_dict(self) -> dict[str, Any]:
        """This rank's."""
        return {name: asdict(entry) for name, entry in self._entries.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self._entries = {name: _Entry(**entry) for name, entry in state.items()}


def _together(reduce: str, one: Value, other: Value) -> Value:
    if reduce in ("mean", "sum"):
        return one + other
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        pair = (torch.as_tensor(one), torch.as_tensor(other))
        return torch.maximum(*pair) if reduce == "max" else torch.minimum(*pair)
    return max(one, other) if reduce == "max" else min(one, other)
