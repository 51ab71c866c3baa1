"""Logged values: kept on the device until they are wanted, then moved at once."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from dream_trainer.host_values import Value, moved, stacked
from dream_trainer.reductions import ReducedValues

#: Name, value and weight of each.
Observations = list[tuple[str, Value, Value]]
_NOTHING = (0.0, 0.0)
#: In a state, beside the names of means.
_REDUCED = "reduced values"


class LoggedValues:
    """Observations since they were last taken. Adding costs no host synchronisation."""

    def __init__(self) -> None:
        self._observations: Observations = []
        self._taken: Observations = []
        self._result: tuple[Any, int | None, str] | None = None
        #: Sums, maxima and minima; None while nobody asks for one.
        self.reduced: ReducedValues | None = None

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

    def log(self, values: Mapping[str, Value], reduce: str, weight: Value | None) -> None:
        """Add one observation of each value to what ``reduce`` makes of them.

        Raises:
            ValueError: there is no such reduction, or a weight for another one than the mean.
        """
        if reduce == "mean":
            self.add(values, 1.0 if weight is None else weight)
            return
        if weight is not None:
            raise ValueError(f"a weight counts in means, and {', '.join(values)} is a {reduce}")
        for name, value in values.items():
            self.add_reduced(name, value, reduce)

    def add_reduced(self, name: str, value: Value, reduce: str) -> None:
        """Add one observation to a sum, a maximum or a minimum."""
        if reduce not in ("sum", "max", "min"):
            raise ValueError(f'reduce={reduce!r} of {name!r} is not "mean", "sum", "max" or "min"')
        if self.reduced is None:
            self.reduced = ReducedValues()
        self.reduced.add(name, value, 1.0, reduce)

    def state_dict(self) -> dict[str, Any]:
        """Values and weights by name that were added and not taken. Differs by rank."""
        self.resolve()
        state: dict[str, Any] = {}
        for name, value, weight in self._observations:
            state.setdefault(name, []).append((value, weight))
        if self.reduced is not None:
            state[_REDUCED] = self.reduced.state_dict()
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self._result = self.reduced = None
        self._observations = [
            (name, value, weight)
            for name, entries in state_dict.items()
            if name != _REDUCED
            for value, weight in entries
        ]
        if _REDUCED in state_dict:
            self.reduced = ReducedValues()
            self.reduced.load_state_dict(state_dict[_REDUCED])

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
        if taken:
            self._taken = taken
        return taken

    @property
    def newest(self) -> Observations:
        """What was added and not taken yet, or else what was taken last; to look at."""
        self.resolve()
        return self._observations or self._taken

    def take_reduced(self) -> ReducedValues | None:
        """Hand over the sums, maxima and minima, and start anew."""
        taken, self.reduced = self.reduced, None
        return taken

    def drop(self) -> None:
        """Forget what was added."""
        self._result = self.reduced = None
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
    brought = iter(
        moved([n for row in rows for entry in row for n in entry if isinstance(n, Tensor)])
    )
    found = []
    for row in rows:
        sums: dict[str, tuple[float, float]] = {}
        for name, value, weight in row:
            value = next(brought) if isinstance(value, Tensor) else value
            weight = next(brought) if isinstance(weight, Tensor) else weight
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


class ArrivingValues:
    """Means of observations that are on their way to the host, while nobody waits for them.

    On CUDA the values are copied behind the work that is queued. Other accelerators are waited for,
    here.

    Args:
        observations: of one row.
    """

    def __init__(self, observations: Observations) -> None:
        self._row = observations
        self._numbers: Tensor | None = None
        self._copied: torch.cuda.Event | None = None
        tensors = [n for entry in observations for n in entry if isinstance(n, Tensor)]
        if tensors:
            packed = stacked(tensors)
            if packed.is_cuda:
                self._numbers = packed.to("cpu", non_blocking=True)
                self._copied = torch.cuda.current_stream(packed.device).record_event()
            else:
                self._numbers = packed.cpu()

    @property
    def are_here(self) -> bool:
        """Whether `values` would not wait."""
        return self._copied is None or self._copied.query()

    def values(self) -> dict[str, float]:
        """A mean by name; waits for what is still on its way."""
        if self._copied is not None:
            self._copied.synchronize()
        numbers = iter([] if self._numbers is None else self._numbers.tolist())
        row: Observations = [
            (
                name,
                next(numbers) if isinstance(value, Tensor) else value,
                next(numbers) if isinstance(weight, Tensor) else weight,
            )
            for name, value, weight in self._row
        ]
        return means([row])[0]


def _is_read_at_once(value: Tensor) -> bool:
    """On the CPU there is nothing to wait for, and a tensor that is kept costs more."""
    return value.is_cpu and type(value) is Tensor


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
