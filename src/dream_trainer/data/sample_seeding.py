"""Random draws inside ``__getitem__`` and ``collate_fn`` as functions of the sample alone."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

from torch.utils.data import Dataset, get_worker_info

from dream_trainer.data.own_generators import OwnGenerator, own_generators, seed_generators
from dream_trainer.randomness import derive, seed_cpu

#: What the sampler asks the data set for: the epoch travels with the index, so that worker
#: processes that live across epochs see the right one.
Key = tuple[int, Any]


class SampleSeeds:
    """Seeds the global generators, and those that one object keeps, again and again.

    Args:
        owner: the object whose own generators are seeded too.
        seed: with the epoch and what is read, fixes the draws.
    """

    def __init__(self, owner: Any, seed: int) -> None:
        self._owner, self._seed = owner, seed
        self._epoch: int | None = None
        self._found: list[OwnGenerator] = []

    def __getstate__(self) -> dict[str, Any]:
        # A worker that is spawned looks for the generators of its own copy.
        return {**vars(self), "_epoch": None, "_found": []}

    def generators(self, epoch: int) -> list[OwnGenerator]:
        """The owner's own generators. Looked for once an epoch: that walks over its attributes."""
        if epoch != self._epoch:
            self._epoch, self._found = epoch, own_generators(self._owner)
        return self._found

    def seed(self, epoch: int, *what: int | str) -> None:
        """Start the draws for one sample or batch."""
        seed = derive(self._seed, epoch, *what)
        seed_cpu(seed)
        if own := self.generators(epoch):
            seed_generators(own, seed)


class SeededDataset(Dataset[Any]):
    """A map-style data set whose draws are seeded sample by sample.

    The generators are left seeded; in the main process the reader puts them back.

    Args:
        dataset: the user's data set.
        seed: with epoch and index, seeds each sample; None leaves all generators alone.
    """

    def __init__(self, dataset: Any, seed: int | None) -> None:
        self.dataset = dataset
        self.seeds = None if seed is None else SampleSeeds(dataset, seed)
        if seed is None and hasattr(dataset, "__getitems__"):
            # One fetch a batch, for data sets that have it; with seeds each sample is its own.
            self.__getitems__ = self._get_many

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        # A loader's own __iter__ looks for the user's attributes on the data set.
        if name.startswith("_") or name in ("dataset", "seeds"):
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __getitem__(self, key: Key) -> tuple[Key, Any]:
        if self.seeds is not None:
            self.seeds.seed(key[0], _number(key[1]))
        return key, self.dataset[key[1]]

    def _get_many(self, keys: Sequence[Key]) -> list[tuple[Key, Any]]:
        samples = self.dataset.__getitems__([index for _, index in keys])
        return list(zip(keys, samples, strict=True))


class SeededCollate:
    """A ``collate_fn`` whose draws are fixed by the first sample of the batch."""

    def __init__(self, collate: Callable[[Any], Any], seed: int | None) -> None:
        self._collate = collate
        self.seeds = None if seed is None else SampleSeeds(collate, seed)

    def __call__(self, items: Any) -> Any:
        is_batch = isinstance(items, list)
        keys: Sequence[Key] = [key for key, _ in items] if is_batch else [items[0]]
        if self.seeds is not None and keys:
            epoch, index = keys[0]
            self.seeds.seed(epoch, _number(index), "collate")
        return self._collate([sample for _, sample in items] if is_batch else items[1])


class StartMapWorker:
    """A ``worker_init_fn`` that shows the user's data set, not ours, in ``get_worker_info()``."""

    def __init__(self, start: Callable[[int], None] | None) -> None:
        self._start = start

    def __call__(self, worker_id: int) -> None:
        info = get_worker_info()
        assert info is not None
        assert isinstance(info.dataset, SeededDataset)
        # Frozen. Attributes that the user's function sets would be set on the wrapper, in vain.
        object.__setattr__(info, "dataset", info.dataset.dataset)
        if self._start is not None:
            self._start(worker_id)


class StartIterableWorker:
    """A ``worker_init_fn`` that seeds the own generators of the worker's copy of the data set."""

    def __init__(self, start: Callable[[int], None] | None, collate: Any) -> None:
        self._start, self._collate = start, collate

    def __call__(self, worker_id: int) -> None:
        info = get_worker_info()
        assert info is not None
        if self._start is not None:
            self._start(worker_id)
        seed_generators(own_generators(info.dataset, self._collate), info.seed)


def _number(index: Any) -> int | str:
    """The same for an index of any integer type."""
    try:
        return operator.index(index)
    except TypeError:
        return repr(index)
