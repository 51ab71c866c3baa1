"""A loader that keeps its position and continues there."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from dream_trainer.data.sample_seeding import Key, SeededCollate, SeededDataset
from dream_trainer.data.sampling import SamplingPlan
from dream_trainer.errors import StateError
from dream_trainer.randomness import (
    RawState,
    decode_state,
    derive,
    encode_state,
    preserved,
    raw_state,
    seed_cpu,
    set_raw_state,
)


class ResumableLoader:
    """Wrap what a user has, so that iteration can be stopped and continued exactly.

    *Map-style* ``DataLoader`` objects (any sampler, batch sampler, workers, collation) are read in
    an order that is a pure function of (seed, epoch); the position is the number of samples
    handed out over all ranks, so a change of ranks or batch size keeps it. Every sample is used
    once: the last batch is divided as evenly as possible. Draws of ``random``, ``numpy`` and
    ``torch`` inside ``__getitem__`` depend on (seed, epoch, sample index) only.

    *Loaders with* ``state_dict`` are asked for it. *Other iterables*, ``IterableDataset`` objects
    among them, are this rank's own data; they continue by skipping what was used, and draw from
    a random stream of their own so that skipping repeats the same draws.

    Iterating gives the batches from the position to the end of the epoch, then the loader
    stands at the beginning of the next one. Prefetched batches do not count as handed out.

    Args:
        loader: a torch ``DataLoader``, a loader with ``state_dict``, or any iterable.
        seed: fixes order and random draws; None takes the trainer's.
        seed_samples: False leaves the generators alone inside ``__getitem__``.

    Attributes:
        num_samples: samples of the last batch on this rank that count; None if unknown. 0 for a
            *filler*, a repeated sample that keeps this rank in step with the others.
        num_samples_all_ranks: samples of the last batch over all ranks; None if unknown.
        is_last: whether the last batch ends its epoch; None if that is not known yet.
        looks_ahead: whether iterables are read one batch ahead, so that ``is_last`` is known.
    """

    def __init__(self, loader: Any, *, seed: int | None = None, seed_samples: bool = True) -> None:
        if isinstance(loader, ResumableLoader):
            raise TypeError("this loader is a ResumableLoader already; pass it as it is")
        if not hasattr(loader, "__iter__"):
            raise TypeError(f"{type(loader).__name__} is not iterable; pass a DataLoader")
        self.loader = loader
        self.epoch = 0
        self.num_samples: int | None = None
        self.num_samples_all_ranks: int | None = None
        self.is_last: bool | None = None
        self._seed, self._seed_samples = seed, seed_samples
        self._rank, self._size = 0, 1
        self.looks_ahead = False
        self._any_rank: Callable[[bool], bool] = bool
        self._position = 0  # samples over all ranks if map-style, else batches of this rank
        self._is_map_style = isinstance(loader, DataLoader) and not (
            isinstance(loader.dataset, IterableDataset) or hasattr(loader, "state_dict")
        )
        self._is_stateful = hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")
        self._is_sequence = isinstance(loader, Sequence)
        self._is_resumed = False
        self._before_peek: tuple[Any, RawState | None] | None = None
        self._stream: RawState | None = None
        self._plan: SamplingPlan | None = None
        self._torch_loader: DataLoader[Any] | None = None

    def attach(
        self,
        *,
        seed: int = 0,
        rank: int = 0,
        size: int = 1,
        looks_ahead: bool = False,
        any_rank: Callable[[bool], bool] = bool,
    ) -> ResumableLoader:
        """Say which rank of how many this is. Trainers call it; a script on one rank need not.

        Args:
            seed: used if the loader was made without one.
            rank: index among the ranks that get different samples.
            size: number of such ranks.
            looks_ahead: read iterables one batch ahead, so that ``is_last`` is known.
            any_rank: collective that tells whether a flag holds on any rank. Iterables use it
                before each batch, so that no rank waits for one that has run out.

        Returns:
            The loader itself.
        """
        self._seed = seed if self._seed is None else self._seed
        self._rank, self._size = rank, size
        self.looks_ahead, self._any_rank = looks_ahead, any_rank
        self._plan = self._torch_loader = None
        return self

    @property
    def batch_size(self) -> int | None:
        """Samples per batch on one rank; None if the loader cannot tell."""
        sampler = getattr(self.loader, "batch_sampler", None)
        if type(sampler) is BatchSampler:
            return sampler.batch_size
        return getattr(self.loader, "batch_size", None)

    @property
    def dataset(self) -> Any:
        """The data set behind it, if there is one."""
        return getattr(self.loader, "dataset", None)

    @property
    def num_batches(self) -> int | None:
        """Batches of a whole epoch on this rank; None if the loader cannot tell."""
        if self._is_map_style:
            return self._sampling_plan.num_batches(self.epoch)
        return len(self.loader) if self._is_sequence else None

    def __len__(self) -> int:
        if self.num_batches is None:
            raise TypeError(f"{type(self.loader).__name__} cannot tell its length")
        return self.num_batches

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch; nothing happens if it is the one under way."""
        if epoch != self.epoch:
            self._start_epoch(epoch)

    def rewind(self) -> None:
        """Go back to the beginning of the first epoch, as each validation does."""
        self._start_epoch(0)

    def num_samples_ahead(self, num_batches: int) -> list[int] | None:
        """Samples over all ranks in each of the next batches, as far as the epoch goes.

        None if the loader cannot tell.
        """
        if not self._is_map_style:
            return None
        return self._sampling_plan.num_samples_ahead(self.epoch, self._position, num_batches)

    def __iter__(self) -> Generator[Any, None, None]:
        yield from self._map_style() if self._is_map_style else self._iterable()
        self._start_epoch(self.epoch + 1)

    def state_dict(self) -> dict[str, Any]:
        """Epoch, position and what is needed to continue there; differs by rank for iterables."""
        state: dict[str, Any] = {
            "epoch": self.epoch,
            "position": self._position,
            "unit": self._unit,
            "seed": self._seed,
        }
        if self._is_map_style:
            state["length"] = self._sampling_plan.num_units(self.epoch)
        elif self._is_stateful:
            inner, stream = self._before_peek or (self.loader.state_dict(), self._stream)
            state["loader"] = inner
            state["stream"] = None if stream is None else encode_state(stream)
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue where another loader of the same data stood.

        Raises:
            StateError: the state is of another kind of loader, seed or length.
        """
        problems = []
        if state_dict["unit"] != self._unit:
            problems.append(
                f"the state counts {state_dict['unit']}, this loader {self._unit}: "
                "it was saved from another kind of loader"
            )
        if self._seed is not None and state_dict["seed"] not in (None, self._seed):
            problems.append(f"seed {state_dict['seed']} in the state, {self._seed} here")
        if self._is_map_style and state_dict["unit"] == self._unit:
            length = self._sampling_plan.num_units(state_dict["epoch"])
            if state_dict["length"] != length:
                problems.append(f"{state_dict['length']} samples in the state, {length} here")
        if problems:
            raise StateError("dataloader", problems, "Continue with the same data and seed.")
        self._start_epoch(state_dict["epoch"])
        self._position = state_dict["position"]
        if self._seed is None:
            self._seed = state_dict["seed"]
            self._plan = self._torch_loader = None  # made with the seed that was not known yet
        if self._is_stateful:
            stream = state_dict["stream"]
            self._before_peek = (
                copy.deepcopy(state_dict["loader"]),
                None if stream is None else decode_state(stream),
            )
            self._is_resumed = True

    # ------------------------------------------------------------------ map-style

    def _map_style(self) -> Iterator[Any]:
        plan, epoch = self._sampling_plan, self.epoch
        batches_left = plan.num_batches(epoch, self._position)
        if not batches_left:
            return
        shares = plan.shares(epoch, self._position)
        iterator = iter(self._map_loader)
        try:
            for share, batch in zip(shares, iterator, strict=False):
                batches_left -= 1
                self._position += share.num_samples_all_ranks
                self.num_samples = share.num_samples
                self.num_samples_all_ranks = share.num_samples_all_ranks
                self.is_last = batches_left == 0
                yield batch
            if batches_left:
                raise RuntimeError(
                    f"the loader ended {batches_left} batches early; "
                    "does __getitem__ or collate_fn raise StopIteration?"
                )
        except Exception:
            # As long as the traceback lives it would keep the worker processes alive.
            self._torch_loader = None
            getattr(iterator, "_shutdown_workers", bool)()
            raise

    @property
    def _sampling_plan(self) -> SamplingPlan:
        if self._plan is None:
            self._plan = SamplingPlan(self.loader, self._seed or 0, self._rank, self._size)
        return self._plan

    @property
    def _map_loader(self) -> DataLoader[Any]:
        """The user's loader again, over keys that carry the epoch. Made once: workers persist."""
        if self._torch_loader is None:
            self._torch_loader = self._make_map_loader()
        # Without a generator of its own it would draw its workers' seed from the global one,
        # once per iterator, and a continued run has one iterator more.
        generator = self._torch_loader.generator
        generator.manual_seed(derive(self._seed or 0, self.epoch, "workers"))
        return self._torch_loader

    def _make_map_loader(self) -> DataLoader[Any]:
        loader = self.loader
        seed = (self._seed or 0) if self._seed_samples else None
        options: dict[str, Any] = {
            "num_workers": loader.num_workers,
            "collate_fn": SeededCollate(loader.collate_fn, seed),
            "pin_memory": loader.pin_memory,
            "timeout": loader.timeout,
            "worker_init_fn": loader.worker_init_fn,
            "multiprocessing_context": loader.multiprocessing_context,
            "prefetch_factor": loader.prefetch_factor,
            "persistent_workers": loader.persistent_workers,
            "generator": torch.Generator(),
        }
        keys = _Keys(self)
        if loader.batch_size is None and loader.batch_sampler is None:
            options |= {"batch_size": None, "sampler": _Single(keys)}
        else:
            options["batch_sampler"] = keys
        return DataLoader(SeededDataset(loader.dataset, seed), **options)

    # ------------------------------------------------------------------ iterables

    def _iterable(self) -> Iterator[Any]:
        iterator = self._open_iterator()
        peeks = self.looks_ahead and not self._is_sequence
        nothing = object()

        def fetch() -> Any:
            with self._own_stream():
                item = next(iterator, nothing)
            return nothing if self._any_rank(item is nothing) else item

        try:
            item = fetch()
            while item is not nothing:
                following = nothing
                self.is_last = None
                if self._is_sequence:
                    self.is_last = self._position + 1 == len(self.loader)
                elif peeks:
                    if self._is_stateful:
                        # Its own state would count the batch that is only looked at. A copy:
                        # the loader may go on to change what it gave.
                        self._before_peek = (
                            copy.deepcopy(self.loader.state_dict()),
                            self._stream,
                        )
                    following = fetch()
                    self.is_last = following is nothing
                self._position += 1
                self.num_samples = self.num_samples_all_ranks = None
                yield item
                item = following if peeks else fetch()
        finally:
            if not self._is_stateful:
                # Workers that persist start anew each epoch; left alone they would wait on.
                getattr(iterator, "_shutdown_workers", bool)()
                self._forget_iterator()

    def _open_iterator(self) -> Iterator[Any]:
        if self._is_sequence:
            return iter(self.loader[self._position :])
        resumed, self._before_peek = self._before_peek, None
        self._is_resumed = False
        if resumed is None and self._is_stateful and self._position:
            resumed = self.loader.state_dict(), self._stream  # left in mid-epoch, by a break
        if resumed is not None:
            inner, self._stream = resumed
            self.loader.load_state_dict(inner)
        if resumed is None or self._stream is None:
            with preserved():
                seed_cpu(derive(self._seed or 0, self.epoch, self._rank, "stream"))
                self._stream = raw_state()
        if not self._is_stateful:
            # Workers that persist, or a generator of the loader's own, would carry their streams
            # from epoch to epoch; a continued run starts them in the middle.
            self._forget_iterator()
            own = getattr(self.loader, "generator", None)
            if isinstance(own, torch.Generator):
                own.manual_seed(derive(self._seed or 0, self.epoch, self._rank, "workers"))
        with self._own_stream():
            iterator: Iterator[Any] = iter(self.loader)
            if self._position and not self._is_stateful:
                warnings.warn(
                    f"{type(self.loader).__name__} has no state_dict: continuing reads and drops "
                    f"{self._position} batches. A map-style data set continues at once.",
                    stacklevel=2,
                )
                for _ in range(self._position):
                    next(iterator, None)
        return iterator

    def _forget_iterator(self) -> None:
        if isinstance(self.loader, DataLoader):
            self.loader._iterator = None

    @contextmanager
    def _own_stream(self) -> Iterator[None]:
        """Draws inside come from the loader's stream, not from the run's."""
        if self._stream is None:
            yield
            return
        with preserved():
            set_raw_state(self._stream)
            try:
                yield
            finally:
                self._stream = raw_state()

    # ------------------------------------------------------------------ both

    @property
    def _unit(self) -> str:
        return "samples" if self._is_map_style else "batches"

    def _start_epoch(self, epoch: int) -> None:
        if self._is_resumed and self._before_peek is not None:
            # Left in mid-epoch, as the loader of a run without interruption was.
            self.loader.load_state_dict(self._before_peek[0])
            iter(self.loader)
        self._is_resumed = False
        self.epoch, self._position = epoch, 0
        self._stream = self._before_peek = None


class _Keys:
    """Batch sampler: this rank's batches from the loader's position on, as (epoch, index)."""

    def __init__(self, owner: ResumableLoader) -> None:
        # A circle of references would leave persistent workers to the garbage collector, which
        # closes their queues first and then waits seconds for each.
        self._owner = weakref.proxy(owner)

    def __iter__(self) -> Iterator[list[Key]]:
        owner = self._owner
        epoch, plan = owner.epoch, owner._sampling_plan
        for share in plan.shares(epoch, owner._position):
            units = (
                [i for batch in share.units for i in batch] if plan.deals_batches else (share.units)
            )
            yield [(epoch, index) for index in units]


class _Single:
    """Sampler over batches of one, for loaders that do not batch."""

    def __init__(self, keys: _Keys) -> None:
        self._keys = keys

    def __iter__(self) -> Iterator[Key]:
        return (batch[0] for batch in self._keys)
