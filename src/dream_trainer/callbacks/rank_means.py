"""Means over ranks of rows that seldom change their names."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from dream_trainer.metrics import Observations, means, merge_ranks, totals
from dream_trainer.reductions import Parts, ReducedValues, merged, parts_of

if TYPE_CHECKING:
    from dream_trainer.world import DreamWorld

_Totals = dict[str, tuple[float, float]]


class RankMeans:
    """Averages rows over the ranks that have different samples.

    Once all rows of all ranks had the same names, later ones travel as numbers alone: one
    collective of a tensor instead of two of pickled objects, and half of the time. A rank whose
    names have changed says so in it, and the objects follow.
    """

    def __init__(self) -> None:
        self._names: tuple[str, ...] | None = None

    def of(
        self,
        rows: Sequence[Observations],
        world: DreamWorld,
        reduced: Sequence[ReducedValues | None] | None = None,
    ) -> list[dict[str, float]]:
        """A value by name for each row. A collective, and a host synchronisation.

        Args:
            rows: as many on every rank.
            world: the ranks.
            reduced: sums, maxima and minima of each row; None where this rank has none at all.

        Raises:
            ValueError: a name has a mean, and is reduced in another way, too.
        """
        others: list[Parts] | None = None if reduced is None else parts_of(reduced)
        if world.dp_size == 1:
            found = means(rows)
            return found if others is None else _joined(found, map(merged, zip(others)))
        mine = totals(rows)
        if self._names is not None:
            names = self._names if others is None else None
            if numbers := _means_of_numbers(mine, names, len(self._names), world):
                return numbers
        parts = world.gather_data_parallel((mine, others))
        kinds = {tuple(row) for part, _ in parts for row in part}
        if len(kinds) == 1:  # as everybody sees
            self._names = kinds.pop()
        found = [merge_ranks(of_ranks) for of_ranks in zip(*(p for p, _ in parts), strict=True)]
        known = [other for _, other in parts if other is not None]
        return found if not known else _joined(found, map(merged, zip(*known, strict=True)))


def _joined(
    rows: list[dict[str, float]], others: Iterable[dict[str, float]]
) -> list[dict[str, float]]:
    found = []
    for row, other in zip(rows, others, strict=True):
        if both := row.keys() & other.keys():
            raise ValueError(
                f"{', '.join(sorted(both))}: logged as a mean, and as a sum, max or min, too; give "
                "one another name"
            )
        found.append(row | other)
    return found


def _means_of_numbers(
    rows: Sequence[_Totals], names: tuple[str, ...] | None, num_names: int, world: DreamWorld
) -> list[dict[str, float]] | None:
    """The means; None if a rank has other names, or other values than means."""
    numbers = [1.0]
    for row in rows:
        if names is None or tuple(row) != names:
            numbers = [0.0] * (1 + 2 * len(rows) * num_names)
            break
        for pair in row.values():
            numbers += pair
    packed = torch.tensor(numbers, dtype=torch.float64, device=world.device)
    parts = world.all_gather(packed)[:: world.tp_size].tolist()
    if not all(part[0] for part in parts):
        return None
    assert names is not None
    sums = weights = [0.0] * (len(rows) * num_names)
    for part in parts:  # what weighs nothing is 0
        sums = list(map(operator.add, sums, part[1::2]))
        weights = list(map(operator.add, weights, part[2::2]))
    pairs = zip(sums, weights, strict=True)
    return [
        {name: total / weight for name, (total, weight) in zip(names, row, strict=True) if weight}
        for row in zip(*[pairs] * len(names), strict=True)
    ]


__all__ = ["RankMeans"]
