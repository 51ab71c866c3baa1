"""Which samples form which batch on which rank: pure functions of (seed, epoch, position)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
)

from dream_trainer.randomness import derive, preserved, seed_cpu


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
        seed: with the epoch, fixes the order.
        rank: index of this rank among those that get different samples.
        size: number of such ranks.
    """

    def __init__(self, loader: DataLoader[Any], seed: int, rank: int, size: int) -> None:
        self._loader, self._seed, self._rank, self._size = loader, seed, rank, size
        own = loader.batch_sampler
        if type(own) is BatchSampler:  # the loader's, or given by the user: both say the same
            self._sampler, self.batch_size, self._drop_last = (
                own.sampler,
                own.batch_size,
                own.drop_last,
            )
        else:
            self._sampler, self.batch_size, self._drop_last = loader.sampler, 1, False
        # A custom batch sampler decides which samples go together; whole batches are dealt out.
        self.deals_batches = own is not None and type(own) is not BatchSampler
        self._order: tuple[int, Sequence[Any]] | None = None

    def num_units(self, epoch: int) -> int:
        """Samples (or custom batches) of an epoch over all ranks, before ``drop_last``."""
        if self.deals_batches or not _is_plain(self._sampler):
            return len(self.order(epoch))
        return self._length

    def num_batches(self, epoch: int, position: int = 0) -> int:
        """Batches that each rank gets from a position to the end of the epoch."""
        left = max(self.num_units(epoch) - self._units_before(epoch, position), 0)
        whole, rest = divmod(left, self.batch_size * self._size)
        return whole if self._drop_last or not rest else whole + 1

    def shares(self, epoch: int, position: int = 0) -> Iterator[Share]:
        """This rank's part of each batch, from ``position`` samples on."""
        start = self._units_before(epoch, position)
        step = self.batch_size * self._size
        order = self.order(epoch)
        for _ in range(self.num_batches(epoch, position)):
            yield self._share(order[start : start + step])
            start += step

    def num_samples_ahead(self, epoch: int, position: int, num_batches: int) -> list[int]:
        """Samples over all ranks in each of the next batches, as far as the epoch goes."""
        count = min(num_batches, self.num_batches(epoch, position))
        start = self._units_before(epoch, position)
        step = self.batch_size * self._size
        if self.deals_batches:
            order = self.order(epoch)
            return [
                sum(len(batch) for batch in order[start + i * step : start + (i + 1) * step])
                for i in range(count)
            ]
        total = self.num_units(epoch)
        return [min(step, total - start - i * step) for i in range(count)]

    def order(self, epoch: int) -> Sequence[Any]:
        """All units of an epoch, in the order that they are used in, over all ranks."""
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, self._make_order(epoch))
        return self._order[1]

    def _make_order(self, epoch: int) -> Sequence[Any]:
        sampler = self._sampler
        seed = derive(self._seed, epoch)
        if not self.deals_batches and _is_plain(sampler):
            if not _shuffles(sampler):
                return range(self._length)
            generator = torch.Generator().manual_seed(seed)
            return _Indices(torch.randperm(self._length, generator=generator))
        source: Any = self._loader.batch_sampler if self.deals_batches else sampler
        with preserved():
            seed_cpu(seed)
            parts = {id(part): part for part in (source, getattr(source, "sampler", sampler))}
            for part in parts.values():
                own = getattr(part, "generator", None)
                if isinstance(own, torch.Generator):
                    own.manual_seed(seed)
                if hasattr(part, "set_epoch"):
                    part.set_epoch(epoch)
            return list(source)

    @property
    def _length(self) -> int:
        data: Any = self._loader.dataset
        return len(getattr(self._sampler, "data_source", data))

    def _share(self, units: Sequence[Any]) -> Share:
        # As even as possible: only the last batch of an epoch can be uneven.
        base, extra = divmod(len(units), self._size)
        start = self._rank * base + min(self._rank, extra)
        mine = units[start : start + base + (self._rank < extra)]
        count = _num_samples if self.deals_batches else len
        # Without a batch this rank would miss the collectives of the others' step.
        return Share(mine if len(mine) else units[:1], count(mine), count(units))

    def _units_before(self, epoch: int, position: int) -> int:
        if not self.deals_batches:
            return position
        seen = units = 0
        for batch in self.order(epoch):
            if seen >= position:
                break
            seen += len(batch)
            units += 1
        return units


class _Indices(Sequence[int]):
    """A tensor of indices as a sequence of ints; slices stay cheap."""

    def __init__(self, indices: torch.Tensor) -> None:
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, key: Any) -> Any:
        return self._indices[key].tolist()


def _num_samples(batches: Sequence[Any]) -> int:
    return sum(len(batch) for batch in batches)


def _is_plain(sampler: Any) -> bool:
    """Whether a sampler visits each sample of the data set once, in order or shuffled."""
    if type(sampler) is RandomSampler:
        return not sampler.replacement and sampler.num_samples == len(sampler.data_source)
    return type(sampler) in (SequentialSampler, DistributedSampler)


def _shuffles(sampler: Any) -> bool:
    return type(sampler) is RandomSampler or bool(getattr(sampler, "shuffle", False))
