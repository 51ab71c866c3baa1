"""A loader as its owner made it: read in its own order, and put back where it was.

Nothing is taken over from the loader. Its order and its draws are those of a loop without this
package, from the global generators perhaps; so a place in it is a state of those.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from dream_trainer.data.own_generators import (
    OwnGenerator,
    generator_state,
    own_generators,
    set_generator_state,
)
from dream_trainer.randomness import decode_state, encode_state, raw_state, set_raw_state

if TYPE_CHECKING:
    from dream_trainer.world.fabric_loader import FabricLoader

#: Samplers whose order is fixed by what they draw when an iteration begins.
_KNOWN_SAMPLERS = (
    BatchSampler,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)


class Reading:
    """One loader and the iteration over it that is under way.

    As it is, for anything that can be read again from its beginning; others know a shorter way to a
    place.

    Args:
        loader: the user's.
        wrapped: what Fabric made of it; None if nothing.
    """

    def __init__(self, loader: Any, wrapped: FabricLoader | None = None) -> None:
        self._loader, self._wrapped = loader, wrapped
        self._start: dict[str, Any] = {}

    def begin(self) -> Iterator[Any]:
        """Batches from the first one on, exactly as ``for batch in loader`` gives them."""
        self._start = self._where()
        return self._opened()

    def state(self) -> dict[str, Any]:
        """What `resume` needs, between two batches. Differs by rank."""
        return {"start": self._start, "now": self._where()}

    def resume(self, state: Mapping[str, Any], position: int) -> Iterator[Any]:
        """Batches from a position on; draws go on as they did from there.

        Args:
            state: what `state` gave at that position.
            position: batches that were handed out before it.
        """
        self._start = dict(state["start"])
        self._go_to(self._start)
        iterator = self._opened_at(position)
        self._go_to(state["now"])
        return iterator

    def state_of_start(self) -> dict[str, Any]:
        """What `begin_at` needs; the same on every rank, so that other ranks can use it."""
        return {}

    def begin_at(self, state: Mapping[str, Any], position: int) -> Iterator[Any]:
        """Batches from a position on, on other ranks than those that gave the state."""
        self.load_state_dict(state)
        self._start = self._where()
        return self._opened_at(position)

    def state_dict(self) -> dict[str, Any]:
        """What the loader keeps from epoch to epoch."""
        return {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`, between two epochs."""

    def _opened(self) -> Iterator[Any]:
        """An iteration from the beginning."""
        return iter(self._loader if self._wrapped is None else self._wrapped.wrapper)

    def _opened_at(self, position: int) -> Iterator[Any]:
        """The same, without the first batches."""
        iterator = self._opened()
        if position:
            warnings.warn(
                f"{type(self._loader).__name__}: reading and dropping the {position} batches of "
                f"this epoch that were trained on. {self._why_read}",
                stacklevel=5,
            )
        for _ in range(position):
            next(iterator, None)
        return iterator

    _why_read = "A ResumableLoader, or one with state_dict, continues at once."

    def _where(self) -> dict[str, Any]:
        return {"global": encode_state(raw_state())}

    def _go_to(self, where: Mapping[str, Any]) -> None:
        set_raw_state(decode_state(where["global"]))


class OfItself(Reading):
    """A loader with ``state_dict`` and ``load_state_dict``, our own among them."""

    def state(self) -> dict[str, Any]:
        return {**super().state(), **self.state_dict()}

    def state_dict(self) -> dict[str, Any]:
        return {"loader": copy.deepcopy(self._loader.state_dict())}

    def state_of_start(self) -> dict[str, Any]:
        return self.state_dict()

    def _opened_at(self, position: int) -> Iterator[Any]:
        return self._opened()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        if state_dict:
            self._loader.load_state_dict(copy.deepcopy(state_dict["loader"]))

    def resume(self, state: Mapping[str, Any], position: int) -> Iterator[Any]:
        self._start = dict(state["start"])
        self.load_state_dict(state)
        iterator = self._opened()
        self._go_to(state["now"])
        return iterator


class OfSequence(Reading):
    """A list of batches."""

    def _opened_at(self, position: int) -> Iterator[Any]:
        return itertools.islice(iter(self._loader), position, None)


class OfDataLoader(Reading):
    """A torch ``DataLoader``, behind Fabric's wrapper or not.

    Its sampler is read up to the place, and nothing is loaded, unless workers draw on the way.
    """

    _loader: DataLoader[Any]
    _why_read = (
        "Its workers may draw on the way. With num_workers=0, or as ResumableLoader(loader), it "
        "continues at once."
    )

    def __init__(self, loader: DataLoader[Any], wrapped: FabricLoader | None = None) -> None:
        super().__init__(loader, wrapped)
        self._generators: list[OwnGenerator] = own_generators(loader)
        for problem in _problems(loader):
            warnings.warn(f"{type(loader).__name__}: {problem}", stacklevel=4)

    def _opened_at(self, position: int) -> Iterator[Any]:
        loader = self._loader
        is_torchs = type(loader).__iter__ is DataLoader.__iter__
        if not is_torchs or loader.num_workers or isinstance(loader.dataset, IterableDataset):
            return super()._opened_at(position)
        if self._wrapped is not None:
            self._wrapped.begin_iteration()
        iterator: Any = iter(loader)
        for _ in range(position):
            next(iterator._sampler_iter, None)
        return iterator if self._wrapped is None else map(self._wrapped.moved, iterator)

    def _where(self) -> dict[str, Any]:
        return {**super()._where(), **self.state_dict()}

    def _go_to(self, where: Mapping[str, Any]) -> None:
        super()._go_to(where)
        self.load_state_dict(where)

    def state_of_start(self) -> dict[str, Any]:
        return {name: self._start[name] for name in ("own", "num_iterations")}

    def state_dict(self) -> dict[str, Any]:
        number = 0 if self._wrapped is None else self._wrapped.num_iterations
        own = [_plain(generator_state(one)) for one in self._generators]
        return {"own": own, "num_iterations": number}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        if not state_dict:
            return
        for generator, state in zip(self._generators, state_dict["own"], strict=False):
            set_generator_state(generator, _own_form(state))
        if self._wrapped is not None:
            self._wrapped.num_iterations = state_dict["num_iterations"]


def is_loader(one: Any) -> bool:
    """Whether an object is read, and keeps a place that can be put back."""
    from dream_trainer.world.fabric_loader import FabricLoader

    is_torchs = isinstance(one, DataLoader) or FabricLoader.of(one) is not None
    return is_torchs or (isinstance(one, Iterable) and keeps_state(one))


def keeps_state(one: Any) -> bool:
    """Whether it gives its state, and takes it back."""
    return hasattr(one, "state_dict") and hasattr(one, "load_state_dict")


def reading_of(loader: Any) -> Reading:
    """How a loader is read."""
    from dream_trainer.world.fabric_loader import FabricLoader

    if (wrapped := FabricLoader.of(loader)) is not None:
        loader = wrapped.loader
    if keeps_state(loader):
        return OfItself(loader, wrapped)
    if isinstance(loader, DataLoader):
        return OfDataLoader(loader, wrapped)
    return OfSequence(loader) if isinstance(loader, Sequence) else Reading(loader)


def _problems(loader: DataLoader[Any]) -> list[str]:
    """What of a loader cannot be put back, one sentence each."""
    problems = []
    if loader.persistent_workers:
        problems.append(
            "with persistent_workers the place in its random streams is not known after a restart. "
            "If its data set draws, leave it off, or use ResumableLoader(loader)."
        )
    if loader.num_workers and not getattr(loader, "in_order", True):
        problems.append("in_order=False hands out batches in the order in which workers finish.")
    samplers = (loader.sampler, loader.batch_sampler)
    for kind in {type(one) for one in samplers if one is not None}:
        is_known = kind in _KNOWN_SAMPLERS or kind.__module__.startswith(("torch.", "lightning."))
        if not is_known:
            problems.append(
                f"what {kind.__name__} keeps from epoch to epoch, beside random generators, is not "
                "known after a restart. If it keeps anything, use ResumableLoader(loader)."
            )
    return problems


def _plain(state: Any) -> Any:
    """A generator's state as plain data and tensors."""
    if isinstance(state, np.ndarray):
        return {"array": torch.from_numpy(state.astype(np.int64)), "dtype": str(state.dtype)}
    if isinstance(state, np.generic):
        return state.item()
    if isinstance(state, Mapping):
        return {key: _plain(value) for key, value in state.items()}
    return tuple(map(_plain, state)) if isinstance(state, tuple) else state


def _own_form(state: Any) -> Any:
    """The inverse of `_plain`."""
    if isinstance(state, Mapping):
        if state.keys() == {"array", "dtype"}:
            return state["array"].numpy().astype(state["dtype"])
        return {key: _own_form(value) for key, value in state.items()}
    return tuple(map(_own_form, state)) if isinstance(state, tuple) else state


__all__ = ["Reading", "is_loader", "keeps_state", "reading_of"]
