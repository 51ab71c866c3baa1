"""Means over ranks of rows that seldom change their names."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from dream_trainer.metrics import Observations, means, merge_ranks, totals

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

    def of(self, rows: Sequence[Observations], world: DreamWorld) -> list[dict[str, float]]:
        """A mean by name for each row. A collective, and a host synchronisation.

        Args:
            rows: as many on every rank.
            world: the ranks.
        """
        if world.dp_size == 1:
            return means(rows)
        mine = totals(rows)
        if self._names is not None and (found := _means_of_numbers(mine, self._names, world)):
            return found
        parts = world.gather_data_parallel(mine)
        kinds = {tuple(row) for part in parts for row in part}
        if len(kinds) == 1:  # as everybody sees
            self._names = kinds.pop()
        return [merge_ranks(of_ranks) for of_ranks in zip(*parts, strict=True)]


def _means_of_numbers(
    rows: Sequence[_Totals], names: tuple[str, ...], world: DreamWorld
) -> list[dict[str, float]] | None:
    """The means; None if the names of a rank are others."""
    numbers = [1.0]
    for row in rows:
        if tuple(row) != names:
            numbers = [0.0] * (1 + 2 * len(rows) * len(names))
            break
        for pair in row.values():
            numbers += pair
    packed = torch.tensor(numbers, dtype=torch.float64, device=world.device)
    parts = world.all_gather(packed)[:: world.tp_size].tolist()
    if not all(part[0] for part in parts):
        return None
    sums = weights = [0.0] * (len(rows) * len(names))
    for part in parts:  # what weighs nothing is 0
        sums = list(map(operator.add, sums, part[1::2]))
        weights = list(map(operator.add, weights, part[2::2]))
    pairs = zip(sums, weights, strict=True)
    return [
        {name: total / weight for name, (total, weight) in zip(names, row, strict=True) if weight}
        for row in zip(*[pairs] * len(names), strict=True)
    ]


__all__ = ["RankMeans"]
