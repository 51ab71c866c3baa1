"""The order of an epoch: a pure function of (seed, epoch), whatever a sampler does to itself."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import (
    Dataset,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from dream_trainer.data.own_generators import (
    own_generators,
    preserved_generators,
    reachable,
    seed_generators,
)
from dream_trainer.data.permutation import Permutation
from dream_trainer.errors import ConfigError
from dream_trainer.randomness import derive, preserved, seed_cpu

#: Data and models that a sampler holds: it reads them, and a copy of it shares them.
_SHARED = (Dataset, nn.Module)
#: Iterating changes nothing but their generator, so they need not be copied.
_UNCHANGED = (
    range,
    list,
    tuple,
    torch.Tensor,
    np.ndarray,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
#: Units of an epoch that no sampler with an end is expected to exceed, unless its data are longer.
_ENDLESS = 10_000_000
#: Shuffled indices that are made at the beginning of an epoch, in 0.1 s and 32 MB at most.
_MOST_IN_MEMORY = 4_000_000


class EpochOrder:
    """What a sampler gives in an epoch, over all ranks.

    Args:
        source: a sampler, or a batch sampler; any iterable.
        dataset: the loader's data set.
        seed: with the epoch, fixes the order.
        gives_batches: whether its units are batches of indices.
    """

    def __init__(self, source: Any, dataset: Any, seed: int, *, gives_batches: bool) -> None:
        self._source, self._dataset, self._seed = source, dataset, seed
        self._gives_batches = gives_batches
        self._is_plain = not gives_batches and _is_plain(source)
        self._known: tuple[int, Sequence[Any]] | None = None
        self._may_copy = True

    @property
    def is_drawn(self) -> bool:
        """Whether code of a user's, or weights, decide; else every sample comes once."""
        return not self._is_plain

    def length(self, epoch: int) -> int:
        """Units of an epoch."""
        if self._is_plain:
            return len(getattr(self._source, "data_source", self._dataset))
        return len(self(epoch))

    def __call__(self, epoch: int) -> Sequence[Any]:
        """The units of an epoch."""
        if self._known is None or self._known[0] != epoch:
            self._known = (epoch, self._plain(epoch) if self._is_plain else self._asked(epoch))
        return self._known[1]

    def _plain(self, epoch: int) -> Sequence[int]:
        length = self.length(epoch)
        if not _shuffles(self._source):
            return range(length)
        seed = derive(self._seed, epoch)
        if length > _MOST_IN_MEMORY:
            return Permutation(length, seed)
        generator = torch.Generator().manual_seed(seed)
        return _Indices(torch.randperm(length, generator=generator))

    def _asked(self, epoch: int) -> Sequence[Any]:
        seed = derive(self._seed, epoch)
        source = part = self._fresh()
        own = own_generators(source, apart=_SHARED)
        with preserved(), preserved_generators(own):
            seed_cpu(seed)
            seed_generators(own, seed)
            while part is not None:
                if hasattr(part, "set_epoch"):
                    part.set_epoch(epoch)
                part = getattr(part, "sampler", None)
            return self._read_out(source)

    def _fresh(self) -> Any:
        """The sampler as the user left it, to iterate over: what that changes must not add up."""
        source = self._source
        if type(source) in _UNCHANGED or not self._may_copy:
            return source
        memo = {
            id(one): one for one in reachable(source, apart=_SHARED) if isinstance(one, _SHARED)
        }
        memo[id(self._dataset)] = self._dataset
        try:
            return copy.deepcopy(source, memo)
        except Exception as error:  # noqa: BLE001 - a user's __deepcopy__ may raise anything
            self._may_copy = False
            warnings.warn(
                f"{type(source).__name__} cannot be copied ({error}). If iterating over it "
                "changes it, a continued run reads in another order.",
                stacklevel=2,
            )
            return source

    def _read_out(self, source: Any) -> Sequence[Any]:
        limit = max(_ENDLESS, 10 * _length(self._dataset), _length(source))
        # A batch sampler may fill one list again and again.
        units = (list(one) for one in source) if self._gives_batches else iter(source)
        order = list(itertools.islice(units, limit + 1))
        if len(order) > limit:
            raise ConfigError(
                type(source).__name__,
                [f"it gave more than {limit} units in one epoch: does it ever end?"],
                "Let it end, with itertools.islice for example; epochs repeat it.",
            )
        return order


class _Indices(Sequence[int]):
    """A tensor of indices as a sequence of ints; slices stay cheap."""

    def __init__(self, indices: torch.Tensor) -> None:
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, key: Any) -> Any:
        return self._indices[key].tolist()


def _is_plain(sampler: Any) -> bool:
    """Whether a sampler visits each sample of the data set once, in order or shuffled."""
    if type(sampler) is RandomSampler:
        return not sampler.replacement and sampler.num_samples == len(sampler.data_source)
    return type(sampler) in (SequentialSampler, DistributedSampler)


def _shuffles(sampler: Any) -> bool:
    return type(sampler) is RandomSampler or bool(getattr(sampler, "shuffle", False))


def _length(thing: Any) -> int:
    try:
        return len(thing)
    except (TypeError, NotImplementedError):
        return 0
