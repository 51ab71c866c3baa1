"""Which samples form which batch on which rank: pure functions of (seed, epoch, position)."""

from __future__ import annotations

import zlib
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from torch.utils.data import BatchSampler, DataLoader

from dream_trainer.data.epoch_order import EpochOrder


@dataclass(frozen=True)
class Place:
    """Which rank of how many reads, and under which seed."""

    seed: int = 0
    """Fixes order and draws."""
    rank: int = 0
    """Index among the ranks that get different samples."""
    size: int = 1
    """Number of such ranks."""
    samples_per_step: int | None = None
    """With it, ``drop_last`` drops what does not fill an optimizer step, on any ranks alike."""
    any_rank: Callable[[bool], bool] = bool
    """Collective that tells whether a flag holds on any rank."""
    first_batches: int | None = None
    """Batches after which an epoch ends on every rank, if it does not end earlier."""


@dataclass(frozen=True)
class Share:
    """What one rank gets of one batch that all ranks share."""

    units: Sequence[Any]
    """What the rank loads: sample indices, or whole batches of a custom batch sampler."""
    num_samples: int
    """How many of its samples count; 0 for a filler that only keeps the ranks in step."""
    num_samples_all_ranks: int
    """Samples of the shared batch."""


class SamplingPlan:
    """The order of a map-style loader and its division into batches.

    Args:
        loader: the user's loader; its sampler says whether and how samples are shuffled.
        place: this rank, and the seed that fixes the order.
    """

    def __init__(self, loader: DataLoader[Any], place: Place) -> None:
        self._place = place
        batches = batch_sampler_of(loader)
        if batches is not None and type(batches) is BatchSampler:
            # The loader's, or given by the user: both say the same.
            source, self.batch_size, self._drops = (
                batches.sampler,
                batches.batch_size,
                batches.drop_last,
            )
        else:
            source = loader.sampler if batches is None else batches
            self.batch_size, self._drops = 1, False
        # A custom batch sampler decides which samples go together; whole batches are dealt out.
        self.deals_batches = batches is not None and type(batches) is not BatchSampler
        self.order = EpochOrder(
            source, loader.dataset, place.seed, gives_batches=self.deals_batches
        )
        self._ends: tuple[int, Sequence[int]] | None = None

    def length(self, epoch: int) -> int:
        """Samples of an epoch over all ranks, before ``drop_last``."""
        if self.deals_batches:
            return self._batch_ends(epoch)[-1]
        return self.order.length(epoch)

    def checksum(self, epoch: int) -> int | None:
        """Of the order, where code of a user's, or weights, decide; equal on ranks that agree."""
        return zlib.crc32(repr(self.order(epoch)).encode()) if self.order.is_drawn else None

    def num_batches(self, epoch: int, position: int = 0) -> int:
        """Batches that each rank gets from a position to the end of the epoch."""
        left = max(self._end(epoch) - self._units_before(epoch, position), 0)
        whole, rest = divmod(left, self._units_per_batch)
        is_kept = not self._drops or self._place.samples_per_step is not None
        return whole + 1 if rest and is_kept else whole

    def shares(self, epoch: int, position: int = 0) -> Iterator[Share]:
        """This rank's part of each batch, from ``position`` samples on."""
        start, step = self._units_before(epoch, position), self._units_per_batch
        order, end = self.order(epoch), self._end(epoch)
        for _ in range(self.num_batches(epoch, position)):
            yield self._share(order[start : min(start + step, end)])
            start += step

    def num_samples_ahead(self, epoch: int, position: int, num_batches: int) -> list[int]:
        """Samples over all ranks in each of the next batches, as far as the epoch goes."""
        count = min(num_batches, self.num_batches(epoch, position))
        start, step, end = (
            self._units_before(epoch, position),
            self._units_per_batch,
            self._end(epoch),
        )
        edges = [min(start + i * step, end) for i in range(count + 1)]
        if self.deals_batches:
            ends = self._batch_ends(epoch)
            edges = [ends[edge] for edge in edges]
        return [after - before for before, after in pairwise(edges)]

    @property
    def _units_per_batch(self) -> int:
        return self.batch_size * self._place.size

    def _end(self, epoch: int) -> int:
        """Units of an epoch that are used, if no batch is dropped for want of samples."""
        units, step = self.order.length(epoch), self._place.samples_per_step
        if self._drops and step is not None:
            units -= units % step
        first = self._place.first_batches
        return units if first is None else min(units, first * self._units_per_batch)

    def _share(self, units: Sequence[Any]) -> Share:
        # As even as possible: only the last batch of an epoch can be uneven.
        rank, size = self._place.rank, self._place.size
        base, extra = divmod(len(units), size)
        start = rank * base + min(rank, extra)
        mine = units[start : start + base + (rank < extra)]
        count = _num_samples if self.deals_batches else len
        # Without a batch this rank would miss the collectives of the others' step.
        return Share(mine if len(mine) else units[:1], count(mine), count(units))

    def _units_before(self, epoch: int, position: int) -> int:
        if not self.deals_batches:
            return position
        return bisect_left(self._batch_ends(epoch), position)

    def _batch_ends(self, epoch: int) -> Sequence[int]:
        """Samples before each batch of a custom batch sampler, and in all."""
        if self._ends is None or self._ends[0] != epoch:
            lengths = (len(batch) for batch in self.order(epoch))
            self._ends = (epoch, list(accumulate(lengths, initial=0)))
        return self._ends[1]


def batch_sampler_of(loader: Any) -> Any:
    """What decides on the batches: given as such, or as the sampler of a loader of single items."""
    if getattr(loader, "batch_sampler", None) is not None:
        return loader.batch_sampler
    sampler = getattr(loader, "sampler", None)
    return sampler if isinstance(sampler, BatchSampler) else None


def _num_samples(batches: Sequence[Any]) -> int:
    return sum(len(batch) for batch in batches)
