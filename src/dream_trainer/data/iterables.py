"""Iterables: each rank reads its own, and continues by its state or by skipping what was used."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.utils.data import DataLoader

from dream_trainer.data.own_generators import own_generators, seed_generators
from dream_trainer.data.reader import HandedOut, Reader
from dream_trainer.data.sample_seeding import StartIterableWorker
from dream_trainer.data.sampling import Place
from dream_trainer.randomness import RawState, Stream, decode_state, derive, encode_state, preserved


class IterableReader(Reader):
    """Reads a loader with ``state_dict``, a sequence of batches, or any other iterable.

    Args:
        loader: the user's.
    """

    unit = "batches"

    def __init__(self, loader: Any) -> None:
        self._loader = loader
        self._has_state = hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")
        self._is_sequence = isinstance(loader, Sequence)
        # Others whose iterator is themselves may start anew in __iter__.
        self._is_one_shot = isinstance(loader, Iterator) and type(loader).__module__ in (
            "builtins",
            "itertools",
        )
        self._was_opened = self._is_resumed = self._is_rewound = False
        self._first: Any = None
        self._before_peek: tuple[Any, RawState | None] | None = None
        self._stream: Stream | None = None
        self.attach(Place())

    def attach(self, place: Place) -> None:
        self._place = place
        self._length_compared = self.length(0)

    def num_batches(self, epoch: int) -> int | None:
        length, first = self.length(epoch), self._place.first_batches
        return length if length is None or first is None else min(length, first)

    def length(self, epoch: int) -> int | None:
        return len(self._loader) if self._is_sequence else None

    def start_epoch(self) -> None:
        if self._is_resumed and self._before_peek is not None:
            # Left in mid-epoch, as the loader of a run without interruption was.
            self._loader.load_state_dict(self._before_peek[0])
            iter(self._loader)
        self._is_resumed = False
        self._stream = self._before_peek = None

    def rewind(self) -> None:
        # A loader with a state goes back to the one it had at its first rewind.
        if not self._has_state:
            return
        if self._first is None and not self._was_opened:
            with preserved():
                self._first = copy.deepcopy(self._loader.state_dict())
        self._is_rewound = self._first is not None

    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = {"rank": self._place.rank, "size": self._place.size}
        if self._has_state:
            inner, stream = self._before_peek or (self._loader.state_dict(), self._stream_state())
            state["loader"] = inner
            state["stream"] = None if stream is None else encode_state(stream)
        return state

    def problems(self, state: Mapping[str, Any]) -> list[str]:
        name = type(self._loader).__name__
        if self._has_state and "loader" not in state:
            return [f"the state is of a loader without state_dict, {name} has one"]
        if not self._has_state and "loader" in state:
            return [f"the state is of a loader with state_dict, {name} has none"]
        return []

    def load(self, state: Mapping[str, Any]) -> None:
        place = self._place
        if state["position"] and state.get("size", place.size) != place.size:
            warnings.warn(
                f"rank {place.rank} of {place.size} continues where rank {state['rank']} of "
                f"{state['size']} was in its own iterable, which nobody divides anew: of this "
                "epoch some samples come twice or never. A map-style data set has no such gap.",
                stacklevel=3,
            )
        if self._has_state:
            stream = None if state["stream"] is None else decode_state(state["stream"])
            self._before_peek = copy.deepcopy(state["loader"]), stream
            self._is_resumed = True

    def read(
        self, epoch: int, position: int, *, looks_ahead: bool
    ) -> Generator[HandedOut, None, None]:
        first = self._place.first_batches
        if self._is_sequence:
            return self._read_sequence(position, first)
        return self._read_iterable(epoch, position, first, looks_ahead)

    def _read_iterable(
        self, epoch: int, position: int, first: int | None, looks_ahead: bool
    ) -> Generator[HandedOut, None, None]:
        if first is not None and position >= first:
            return
        iterator = self._open(epoch, position)
        nothing = object()

        def fetch() -> Any:
            with self._own_stream():
                item = next(iterator, nothing)
            return nothing if self._place.any_rank(item is nothing) else item

        try:
            item = fetch()
            while item is not nothing:
                position += 1
                following, is_last = nothing, None
                if position == first:
                    is_last, self._before_peek = True, None
                elif looks_ahead:
                    if self._has_state:
                        # Its own state would count the batch that is only looked at. A copy:
                        # the loader may go on to change what it gave.
                        inner = copy.deepcopy(self._loader.state_dict())
                        self._before_peek = (inner, self._stream_state())
                    following = fetch()
                    is_last = following is nothing
                yield HandedOut(item, 1, None, None, is_last)
                if position == first:
                    return
                item = following if looks_ahead else fetch()
        finally:
            if not self._has_state:
                # Workers that persist would wait for an epoch that starts with new ones.
                getattr(iterator, "_shutdown_workers", bool)()

    def _read_sequence(self, position: int, first: int | None) -> Generator[HandedOut, None, None]:
        batches, any_rank = self._loader, self._place.any_rank
        length = len(batches)
        # Once an epoch, and not before each batch: who attaches it compares the ranks' lengths.
        may_differ = any_rank(length != self._length_compared)
        length = length if first is None else min(length, first)
        while not (any_rank(position >= length) if may_differ else position >= length):
            batch = batches[position]
            position += 1
            yield HandedOut(batch, 1, None, None, position == length)

    def _open(self, epoch: int, position: int) -> Iterator[Any]:
        loader = self._loader
        if self._is_one_shot and self._was_opened:
            raise RuntimeError(
                f"this {type(loader).__name__} can be read once only, so it gave no batch in epoch "
                f"{epoch}: pass an object whose __iter__ starts anew."
            )
        self._was_opened = True
        if self._has_state:
            return self._open_with_state(epoch, position)
        self._start_stream(epoch)
        with self._own_stream():
            parts: tuple[Any, ...] = (loader, getattr(loader, "dataset", None))
            for part in parts:
                if hasattr(part, "set_epoch"):
                    part.set_epoch(epoch)
            iterator: Iterator[Any] = iter(self._started_anew(epoch))
            if position:
                warnings.warn(
                    f"{type(loader).__name__} has no state_dict: continuing reads and drops "
                    f"{position} batches. A map-style data set continues at once.",
                    stacklevel=4,
                )
        for _ in range(position):
            with self._own_stream():
                next(iterator, None)
        return iterator

    def _open_with_state(self, epoch: int, position: int) -> Iterator[Any]:
        loader = self._loader
        resumed, self._before_peek = self._before_peek, None
        self._is_resumed = False
        if resumed is None and position:
            resumed = loader.state_dict(), self._stream_state()  # left in mid-epoch, by a break
        if resumed is None and self._is_rewound:
            resumed = copy.deepcopy(self._first), None
        self._is_rewound = False
        inner, stream = resumed or (None, None)
        if resumed is not None:
            loader.load_state_dict(inner)
        self._start_stream(epoch)
        with self._own_stream():
            iterator: Iterator[Any] = iter(loader)
        # What opening draws, a seed for workers perhaps, was drawn before the state was taken.
        self._stream = self._stream if stream is None else Stream.at(stream)
        return iterator

    def _start_stream(self, epoch: int) -> None:
        self._stream = Stream(derive(self._place.seed, epoch, self._place.rank, "stream"))

    def _stream_state(self) -> RawState | None:
        return None if self._stream is None else self._stream.raw_state()

    def _started_anew(self, epoch: int) -> Any:
        """The loader with its own generators at the epoch's beginning, and without old workers.

        Workers that persist, and generators, would carry their state from epoch to epoch; a
        continued run starts them in the middle.
        """
        loader = self._loader
        seed = derive(self._place.seed, epoch, self._place.rank, "workers")
        if not isinstance(loader, DataLoader):
            seed_generators(own_generators(loader), seed)
            return loader
        seed_generators(own_generators(loader.dataset, loader.collate_fn), seed)
        again = copy.copy(loader)
        parts: dict[str, Any] = {
            "generator": torch.Generator().manual_seed(seed),
            "worker_init_fn": StartIterableWorker(loader.worker_init_fn, loader.collate_fn),
            "_iterator": None,
            "_IterableDataset_len_called": None,  # it would warn of every batch beyond
        }
        vars(again).update(parts)
        return again

    def _own_stream(self) -> AbstractContextManager[None]:
        """Draws inside come from the loader's stream, not from the run's."""
        return nullcontext() if self._stream is None else self._stream
