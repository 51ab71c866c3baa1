"""Means of logged values: kept on the device until they are wanted, then moved at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

Value = Tensor | float | int
#: Name -> (value, weight) of each observation.
Observations = dict[str, list[tuple[Value, Value]]]


def scalars(result: Any) -> dict[str, Value]:
    """The loggable part of what a step returned: a mapping's scalars, or a loss alone."""
    if isinstance(result, Tensor):
        result = {"loss": result}
    if not isinstance(result, Mapping):
        return {}
    return {
        name: value
        for name, value in result.items()
        if (isinstance(value, Tensor) and value.numel() == 1)
        or (isinstance(value, (int, float)) and not isinstance(value, bool))
    }


def observation(result: Any, num_samples: int | None) -> tuple[dict[str, Value], Value]:
    """What a step returned, and how much it counts in means.

    Args:
        result: of the step. A ``"weight"`` in a mapping says how much the batch counts.
        num_samples: what it counts otherwise; None counts 1. 0 is a filler, which never counts.
    """
    values = scalars(result)
    weight = values.pop("weight", 1.0 if num_samples is None else float(num_samples))
    return values, 0.0 if num_samples == 0 else weight


class LoggedValues:
    """Observations since they were last taken. Adding costs no host synchronisation."""

    def __init__(self) -> None:
        self._observations: Observations = {}

    def add(self, values: Mapping[str, Value], weight: Value = 1.0, prefix: str = "") -> None:
        """Add one observation of each value."""
        weight = _kept(weight)
        for name, value in values.items():
            self._observations.setdefault(prefix + name, []).append((_kept(value), weight))

    def state_dict(self) -> Observations:
        """What was added and not taken. Differs by rank."""
        return {name: list(entries) for name, entries in self._observations.items()}

    def load_state_dict(self, state_dict: Mapping[str, Iterable[tuple[Value, Value]]]) -> None:
        """The inverse of `state_dict`."""
        self._observations = {name: list(entries) for name, entries in state_dict.items()}

    def take(self) -> Observations:
        """Hand over what was added, and start anew."""
        taken, self._observations = self._observations, {}
        return taken


def totals(rows: Iterable[Observations]) -> list[dict[str, tuple[float, float]]]:
    """Per row: name -> (weighted sum, sum of weights). One transfer, a host synchronisation."""
    rows = list(rows)
    pairs = [pair for row in rows for entries in row.values() for pair in entries]
    host = iter(to_host([number for pair in pairs for number in pair]))

    def total(entries: list[tuple[Value, Value]]) -> tuple[float, float]:
        pairs = [(next(host), next(host)) for _ in entries]
        # What weighs nothing may be NaN, and 0 x NaN is NaN.
        return sum(v * w for v, w in pairs if w), sum(w for _, w in pairs)

    return [{name: total(entries) for name, entries in row.items()} for row in rows]


def _kept(value: Value) -> Value:
    if not isinstance(value, Tensor):
        return value
    # Anything but a fresh result may be changed in place before it is read.
    is_fresh = value.grad_fn is not None and value._base is None
    return value.detach() if is_fresh else value.detach().clone()


def to_host(values: list[Value]) -> list[float]:
    """Values as Python floats, in one transfer. A host synchronisation."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    if not tensors:
        return [float(value) for value in values]
    # A user's own value, or one from a checkpoint, may be on the CPU beside an accelerator's.
    device = next((t.device for t in tensors if t.device.type != "cpu"), tensors[0].device)
    stacked = torch.stack([tensor.reshape(()).double().to(device) for tensor in tensors])
    moved = iter(stacked.tolist())
    return [next(moved) if isinstance(value, Tensor) else float(value) for value in values]


def merge_ranks(parts: Iterable[Mapping[str, tuple[float, float]]]) -> dict[str, float]:
    """Means over ranks of (weighted sum, sum of weights) by name; fillers weigh nothing."""
    sums: dict[str, float] = {}
    weights: dict[str, float] = {}
    for part in parts:
        for name, (value, weight) in part.items():
            if weight:
                sums[name] = sums.get(name, 0.0) + value
                weights[name] = weights.get(name, 0.0) + weight
    return {name: sums[name] / weights[name] for name in sums}
