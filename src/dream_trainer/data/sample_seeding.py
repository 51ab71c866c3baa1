"""Random draws inside ``__getitem__`` and ``collate_fn`` as functions of the sample alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch.utils.data import Dataset, get_worker_info

from dream_trainer.randomness import derive, preserved, seed_cpu

#: What the sampler asks the data set for: the epoch travels with the index, so that worker
#: processes that live across epochs see the right one.
Key = tuple[int, Any]


class SeededDataset(Dataset[Any]):
    """A map-style data set whose samples are drawn with a generator of their own.

    Args:
        dataset: the user's data set.
        seed: with epoch and index, seeds each sample; None leaves all generators alone.
    """

    def __init__(self, dataset: Any, seed: int | None) -> None:
        self._dataset, self._seed = dataset, seed
        if seed is None and hasattr(dataset, "__getitems__"):
            # One fetch a batch, for data sets that have it; with seeds each sample is its own.
            self.__getitems__ = self._get_many

    def __len__(self) -> int:
        return len(self._dataset)

    def __getattr__(self, name: str) -> Any:
        # A worker_init_fn looks for the user's own attributes on the worker's data set.
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._dataset, name)

    def __getitem__(self, key: Key) -> tuple[Key, Any]:
        epoch, index = key
        if self._seed is None:
            return key, self._dataset[index]
        with _isolated():
            seed_cpu(derive(self._seed, epoch, _number(index)))
            return key, self._dataset[index]

    def _get_many(self, keys: Sequence[Key]) -> list[tuple[Key, Any]]:
        samples = self._dataset.__getitems__([index for _, index in keys])
        return list(zip(keys, samples, strict=True))


class SeededCollate:
    """A ``collate_fn`` that draws with a generator fixed by the first sample of the batch."""

    def __init__(self, collate: Callable[[Any], Any], seed: int | None) -> None:
        self._collate, self._seed = collate, seed

    def __call__(self, items: Any) -> Any:
        is_batch = isinstance(items, list)
        keys: Sequence[Key] = [key for key, _ in items] if is_batch else [items[0]]
        samples = [sample for _, sample in items] if is_batch else items[1]
        if self._seed is None:
            return self._collate(samples)
        epoch, index = keys[0]
        with _isolated():
            seed_cpu(derive(self._seed, epoch, _number(index), "collate"))
            return self._collate(samples)


def _isolated() -> AbstractContextManager[None]:
    # In a worker nothing else draws, so the streams need not be put back.
    return preserved() if get_worker_info() is None else nullcontext()


def _number(index: Any) -> int | str:
    return index if isinstance(index, int) else repr(index)
