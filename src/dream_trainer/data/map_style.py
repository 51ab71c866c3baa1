"""Map-style loaders: any position of any epoch at once, the same on any workers and ranks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader

from dream_trainer.data.own_generators import preserved_generators
from dream_trainer.data.reader import HandedOut, Reader
from dream_trainer.data.sample_seeding import Key, SeededCollate, SeededDataset, StartMapWorker
from dream_trainer.data.sampling import Place, SamplingPlan, Share
from dream_trainer.randomness import Apart, derive, drop_spare_normal, seed_cpu


class MapStyleReader(Reader):
    """Reads a ``DataLoader`` with a map-style data set.

    Args:
        loader: the user's; it is not changed.
        seed_samples: False leaves the generators alone inside ``__getitem__``.
    """

    unit = "samples"

    def __init__(self, loader: DataLoader[Any], *, seed_samples: bool) -> None:
        self._loader, self._seeds_samples = loader, seed_samples
        # Those of the base class ask for a sample, which is seeded, before anything is drawn.
        self._may_draw_itself = type(loader).__iter__ is not DataLoader.__iter__
        self._apart = Apart()
        self.attach(Place())

    def attach(self, place: Place) -> None:
        self._place = place
        self._plan = SamplingPlan(self._loader, place)
        self._keys = _Keys(self._asks_for())
        self._torch_loader: DataLoader[Any] | None = None

    def num_batches(self, epoch: int) -> int:
        return self._plan.num_batches(epoch)

    def length(self, epoch: int) -> int:
        return self._plan.length(epoch)

    def checksum(self, epoch: int) -> int | None:
        return self._plan.checksum(epoch)

    def num_samples_ahead(self, epoch: int, position: int, num_batches: int) -> list[int]:
        return self._plan.num_samples_ahead(epoch, position, num_batches)

    def samples(self, units: Sequence[Any]) -> list[Any]:
        return [one for unit in units for one in unit] if self._plan.deals_batches else list(units)

    def close(self) -> None:
        loader, self._torch_loader = self._torch_loader, None
        if loader is not None:
            getattr(vars(loader)["_iterator"], "_shutdown_workers", bool)()

    def read(
        self, epoch: int, position: int, *, looks_ahead: bool
    ) -> Generator[HandedOut, None, None]:
        left = self._plan.num_batches(epoch, position)
        if not left:
            return
        self._keys.start(epoch, self._plan.shares(epoch, position), left)
        iterator = self._open(epoch)
        nothing = object()
        try:
            for share in self._plan.shares(epoch, position):
                with self._isolated(epoch, left):
                    batch = next(iterator, nothing)
                if batch is nothing:
                    raise RuntimeError(
                        f"the loader ended {left} batches early; "
                        "does __getitem__ or collate_fn raise StopIteration?"
                    )
                left -= 1
                if left < self._keys.num_left:
                    raise RuntimeError(
                        f"{type(self._loader).__name__}.__iter__ gave a batch that is not of this "
                        "epoch. It may change the batches of DataLoader.__iter__, one by one."
                    )
                yield HandedOut(
                    batch,
                    advance=share.num_samples_all_ranks,
                    num_samples=share.num_samples,
                    num_samples_all_ranks=share.num_samples_all_ranks,
                    is_last=left == 0,
                    units=share.units,
                )
        except Exception:
            # As long as the traceback lives it would keep the worker processes alive.
            self._torch_loader = None
            getattr(iterator, "_shutdown_workers", bool)()
            raise

    def _open(self, epoch: int) -> Iterator[Any]:
        if self._torch_loader is None:  # made once, so that workers persist
            self._torch_loader = self._over_keys()
        # Without a generator of its own it would draw its workers' seed from the global one,
        # once per iterator, and a continued run has one iterator more.
        place = self._place
        self._torch_loader.generator.manual_seed(derive(place.seed, epoch, place.rank, "workers"))
        return iter(self._torch_loader)

    def _over_keys(self) -> DataLoader[Any]:
        """The user's loader again, every option of it, over keys that carry the epoch."""
        loader = self._loader
        seed = self._place.seed if self._seeds_samples else None
        parts: dict[str, Any] = {
            "dataset": SeededDataset(loader.dataset, seed),
            "collate_fn": SeededCollate(loader.collate_fn, seed),
            "worker_init_fn": StartMapWorker(loader.worker_init_fn),
            "generator": torch.Generator(),
            "_iterator": None,
            "sampler" if loader.batch_sampler is None else "batch_sampler": self._keys,
        }
        again = copy.copy(loader)
        vars(again).update(parts)  # assigning is refused by DataLoader
        return again

    def _asks_for(self) -> Callable[[int, Sequence[Any]], list[Key] | Key]:
        if self._loader.batch_sampler is not None:
            return _dealt_batches if self._plan.deals_batches else _batch
        # Without batches the data set is asked for what the sampler gives, a list perhaps.
        return _whole_batch if type(self._loader.sampler) is BatchSampler else _single

    @contextmanager
    def _isolated(self, epoch: int, num_left: int) -> Iterator[None]:
        """In the main process samples are drawn among the run's own draws: put those back."""
        again = self._torch_loader
        if not self._seeds_samples or self._loader.num_workers or again is None:
            drop_spare_normal()
            yield
            return
        both: tuple[Any, Any] = (again.dataset, again.collate_fn)
        own = [one for part in both for one in part.seeds.generators(epoch)]
        with self._apart, preserved_generators(own):
            if self._may_draw_itself:
                seed_cpu(derive(self._place.seed, epoch, self._place.rank, num_left, "iterator"))
            yield


class _Keys:
    """A sampler, or batch sampler, over (epoch, index), of one epoch from one position on.

    Args:
        asks_for: what the data set is asked for, with an epoch and the units of a share.
    """

    def __init__(self, asks_for: Callable[[int, Sequence[Any]], list[Key] | Key]) -> None:
        self._asks_for = asks_for
        self._epoch = self._length = self.num_left = 0
        self._shares: Iterator[Share] | None = None

    def start(self, epoch: int, shares: Iterator[Share], num_batches: int) -> None:
        """Say what comes next."""
        self._epoch, self._shares = epoch, shares
        self._length = self.num_left = num_batches

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[list[Key] | Key]:
        shares, self._shares = self._shares, None
        if shares is None:
            raise RuntimeError("DataLoader.__iter__ was read twice in one epoch; read it once")
        for share in shares:
            self.num_left -= 1
            yield self._asks_for(self._epoch, share.units)


def _batch(epoch: int, units: Sequence[Any]) -> list[Key]:
    return [(epoch, index) for index in units]


def _dealt_batches(epoch: int, units: Sequence[Any]) -> list[Key]:
    return [(epoch, index) for batch in units for index in batch]


def _whole_batch(epoch: int, units: Sequence[Any]) -> Key:
    return epoch, list(units)


def _single(epoch: int, units: Sequence[Any]) -> Key:
    return epoch, units[0]
