"""Means of logged values: kept on the device until they are wanted, then moved at once."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Value = Tensor | float | int
#: Name, value and weight of each.
Observations = list[tuple[str, Value, Value]]
_NOTHING = (0.0, 0.0)


class LoggedValues:
    """Observations since they were last taken. Adding costs no host synchronisation."""

    def __init__(self) -> None:
        self._observations: Observations = []
        self._result: tuple[Any, int | None, str] | None = None

    def add_result(self, result: Any, num_samples: int | None, prefix: str) -> None:
        """Add what a step returned. It is looked at when somebody asks for it, or in `resolve`.

        Args:
            result: a mapping, of which the scalars count; a loss; or anything else, which is
                nothing. A ``"weight"`` in a mapping says how much the batch counts in means.
            num_samples: what it counts otherwise; None counts 1. 0 is a filler, which never counts.
            prefix: of the names.
        """
        if self._result is not None:
            self.resolve()
        self._result = result, num_samples, prefix

    def add_number(self, name: str, value: float) -> None:
        """Add one observation of one number."""
        if self._result is not None:
            self.resolve()
        self._observations.append((name, value, 1.0))

    def add(self, values: Mapping[str, Value], weight: Value = 1.0, prefix: str = "") -> None:
        """Add one observation of each value."""
        if self._result is not None:
            self.resolve()
        if isinstance(weight, Tensor):
            weight = _kept(weight)
        for name, value in values.items():
            if isinstance(value, Tensor):
                value = _kept(value)
            self._observations.append((prefix + name, value, weight))

    def state_dict(self) -> dict[str, list[tuple[Value, Value]]]:
        """Values and weights by name that were added and not taken. Differs by rank."""
        self.resolve()
        state: dict[str, list[tuple[Value, Value]]] = {}
        for name, value, weight in self._observations:
            state.setdefault(name, []).append((value, weight))
        return state

    def load_state_dict(self, state_dict: Mapping[str, Iterable[tuple[Value, Value]]]) -> None:
        """The inverse of `state_dict`."""
        self._result = None
        self._observations = [
            (name, value, weight)
            for name, entries in state_dict.items()
            for value, weight in entries
        ]

    def named(self, names: Collection[str]) -> Observations:
        """Those of some names that were added and not taken; they stay."""
        self.resolve()
        return [one for one in self._observations if one[0] in names]

    def names(self) -> set[str]:
        """Names of those that were added and not taken."""
        self.resolve()
        return {name for name, _, _ in self._observations}

    def take(self) -> Observations:
        """Hand over what was added, and start anew."""
        if self._result is not None:
            self.resolve()
        taken, self._observations = self._observations, []
        return taken

    def drop(self) -> None:
        """Forget what was added."""
        self._result = None
        if self._observations:
            self._observations = []

    def resolve(self) -> None:
        """Look at the result that was added last: before anything can change its tensors."""
        # In every step: one loop, and no call for each value.
        if self._result is None:
            return
        (result, num_samples, prefix), self._result = self._result, None
        if isinstance(result, Tensor):
            result = {"loss": result}
        elif type(result) is not dict and not isinstance(result, Mapping):
            return
        weight: Value = 1.0 if num_samples is None else float(num_samples)
        found = []
        for name, value in result.items():
            if isinstance(value, Tensor):
                if value.numel() != 1:
                    continue
                value = _kept(value)
            elif not isinstance(value, (int, float)) or isinstance(value, bool):
                continue
            if name == "weight":
                weight = value if num_samples != 0 else weight
            else:
                found.append((prefix + name, value))
        self._observations += [(name, value, weight) for name, value in found]


def totals(rows: Iterable[Observations]) -> list[dict[str, tuple[float, float]]]:
    """Per row: name -> (weighted sum, sum of weights). One transfer, a host synchronisation."""
    rows = list(rows)
    if (simple := _totals_of_numbers(rows)) is not None:
        return simple
    moved = iter(
        _moved([n for row in rows for entry in row for n in entry if isinstance(n, Tensor)])
    )
    found = []
    for row in rows:
        sums: dict[str, tuple[float, float]] = {}
        for name, value, weight in row:
            value = next(moved) if isinstance(value, Tensor) else value
            weight = next(moved) if isinstance(weight, Tensor) else weight
            # What weighs nothing may be NaN, and 0 x NaN is NaN.
            one = (value * weight, weight) if weight else _NOTHING
            if name in sums:
                total, total_weight = sums[name]
                one = total + one[0], total_weight + one[1]
            sums[name] = one
        found.append(sums)
    return found


def _totals_of_numbers(rows: Iterable[Observations]) -> list[dict[str, tuple[float, float]]] | None:
    """`totals` of rows of numbers that count, once each: a quarter of the time. Else None."""
    found = []
    for row in rows:
        sums: dict[str, tuple[float, float]] = {}
        for name, value, weight in row:
            if isinstance(value, Tensor) or isinstance(weight, Tensor) or not weight:
                return None
            sums[name] = value * weight, weight
        if len(sums) < len(row):
            return None
        found.append(sums)
    return found


def means(rows: Iterable[Observations]) -> list[dict[str, float]]:
    """`totals` and `merge_ranks` of one rank alone. One transfer, a host synchronisation."""
    return [
        {name: total / weight for name, (total, weight) in row.items() if weight}
        for row in totals(rows)
    ]


def _kept(value: Tensor) -> Value:
    if _is_read_at_once(value):
        return value.item()
    # Anything but a fresh result may be changed in place before it is read.
    is_fresh = not value.is_leaf and not value._is_view()
    return value.detach() if is_fresh else value.detach().clone()


def to_host(values: Iterable[Value]) -> list[float]:
    """Numbers, and tensors of one element, as floats; in one transfer. A host synchronisation."""
    values = list(values)
    moved = iter(_moved([value for value in values if isinstance(value, Tensor)]))
    return [next(moved) if isinstance(value, Tensor) else float(value) for value in values]


def _is_read_at_once(value: Tensor) -> bool:
    """On the CPU there is nothing to wait for, and a tensor that is kept costs more."""
    return value.is_cpu and type(value) is Tensor


def _moved(tensors: Sequence[Tensor]) -> list[float]:
    if not tensors:
        return []
    # A user's own value, or one from a checkpoint, may be on the CPU beside an accelerator's.
    device = next((t.device for t in tensors if t.device.type != "cpu"), tensors[0].device)
    dtype = tensors[0].dtype
    if any(t.dtype != dtype or t.device != device for t in tensors):
        tensors = [tensor.double().to(device) for tensor in tensors]
    stacked = torch.stack([t.reshape(()) if t.ndim else t for t in tensors])
    moved: list[float] = stacked.double().tolist()
    return moved


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
