"""A loader that keeps its position and continues there."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from types import GeneratorType
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset

from dream_trainer.data.iterables import IterableReader
from dream_trainer.data.map_style import MapStyleReader
from dream_trainer.data.reader import Reader
from dream_trainer.data.sampling import Place, batch_sampler_of
from dream_trainer.errors import ConfigError, StateError


class ResumableLoader:
    """Wrap what a user has, so that iteration can be stopped and continued exactly.

    *Map-style* ``DataLoader`` objects (any sampler, batch sampler, workers, collation) are read in
    an order that is a pure function of (seed, epoch); the position is the number of samples
    handed out over all ranks, so a change of ranks or batch size keeps it. Every sample is used
    once: the last batch is divided as evenly as possible. Draws of ``random``, ``numpy`` and
    ``torch`` inside ``__getitem__``, also from generators that the data set keeps, depend on
    (seed, epoch, sample index) only.

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

    Raises:
        TypeError: it is not iterable, or resumable already.
        ConfigError: an option of the ``DataLoader`` leaves the order to chance.
    """

    def __init__(self, loader: Any, *, seed: int | None = None, seed_samples: bool = True) -> None:
        if isinstance(loader, ResumableLoader):
            raise TypeError("this loader is a ResumableLoader already; pass it as it is")
        if not hasattr(loader, "__iter__"):
            raise TypeError(f"{type(loader).__name__} is not iterable; pass a DataLoader")
        is_map_style = isinstance(loader, DataLoader) and not (
            isinstance(loader.dataset, IterableDataset) or hasattr(loader, "state_dict")
        )
        _refuse_chance(loader)
        self.loader = loader
        self.epoch = 0
        self.num_samples: int | None = None
        self.num_samples_all_ranks: int | None = None
        self.is_last: bool | None = None
        self.looks_ahead = False
        self._seed = seed
        self._place = Place(seed=seed or 0)
        self._position = 0
        self._repeats = False
        self._units: Sequence[Any] = ()
        self._reader: Reader = (
            MapStyleReader(loader, seed_samples=seed_samples)
            if is_map_style
            else IterableReader(loader)
        )
        self._reader.attach(self._place)

    def attach(
        self,
        *,
        seed: int = 0,
        rank: int = 0,
        size: int = 1,
        looks_ahead: bool = False,
        any_rank: Callable[[bool], bool] = bool,
        samples_per_step: int | None = None,
    ) -> ResumableLoader:
        """Say which rank of how many this is. Trainers call it; a script on one rank need not.

        Args:
            seed: used if the loader was made without one.
            rank: index among the ranks that get different samples.
            size: number of such ranks.
            looks_ahead: read iterables one batch ahead, so that ``is_last`` is known.
            any_rank: collective that tells whether a flag holds on any rank. Iterables use it
                before each batch, so that no rank waits for one that has run out.
            samples_per_step: samples of an optimizer step over all ranks, if that is fixed. With
                it, ``drop_last`` drops the samples that do not fill a step, on any number of ranks
                and with any batch size the same.

        Returns:
            The loader itself.
        """
        self._seed = seed if self._seed is None else self._seed
        self.looks_ahead = looks_ahead
        first = self._place.first_batches
        self._place = Place(self._seed, rank, size, samples_per_step, any_rank, first)
        self._reader.attach(self._place)
        return self

    def repeat_first(self, num_batches: int | None) -> None:
        """Make every epoch the first batches of epoch 0: the same samples, order and draws.

        Call it before the loader is read. A loader with ``state_dict`` goes back to the state that
        it has now.

        Args:
            num_batches: on each rank; None lets the epochs be themselves again.
        """
        self._repeats = num_batches is not None
        self._place = replace(self._place, first_batches=num_batches)
        self._reader.attach(self._place)
        if self._repeats:
            self._reader.rewind()

    @property
    def batch_size(self) -> int | None:
        """Samples per batch on one rank; None if the loader cannot tell."""
        sampler = batch_sampler_of(self.loader)
        if type(sampler) is BatchSampler:
            return sampler.batch_size
        return getattr(self.loader, "batch_size", None)

    @property
    def dataset(self) -> Any:
        """The data set behind it, if there is one."""
        return getattr(self.loader, "dataset", None)

    @property
    def gives_batches(self) -> bool:
        """Whether what is handed out is a batch; a data set may be read sample by sample."""
        is_loader = isinstance(self.loader, DataLoader)
        is_single = is_loader and batch_sampler_of(self.loader) is None
        return not is_single or isinstance(self.dataset, IterableDataset)

    @property
    def sample_indices(self) -> list[Any] | None:
        """Of the last batch on this rank, the indices in the data set of the samples that count.

        What a sampler gives need not be an integer. None if the loader cannot tell.
        """
        return [] if self.num_samples == 0 else self._reader.samples(self._units)

    @property
    def num_batches(self) -> int | None:
        """Batches of a whole epoch on this rank; None if the loader cannot tell."""
        return self._reader.num_batches(self._read_as(self.epoch))

    @property
    def length(self) -> int | None:
        """Length of the epoch in the unit of the position, before ``drop_last``; None if unknown.

        Samples over all ranks if map-style, batches of this rank otherwise.
        """
        return self._reader.length(self._read_as(self.epoch))

    @property
    def order_checksum(self) -> int | None:
        """A checksum of the order that a sampler of a user's gave; differs if ranks disagree."""
        return self._reader.checksum(self._read_as(self.epoch))

    def __len__(self) -> int:
        if self.num_batches is None:
            raise TypeError(f"{type(self.loader).__name__} cannot tell its length")
        return self.num_batches

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch; nothing happens if it is the one under way."""
        if epoch != self.epoch:
            self._start_epoch(epoch)

    def rewind(self) -> None:
        """Go back to the beginning of the first epoch, as each validation does.

        A loader with ``state_dict`` goes back to the state that it had before it was first read.
        Rewind it once before that; later its first state is not known.
        """
        self._start_epoch(0)
        self._reader.rewind()

    def close(self) -> None:
        """End worker processes that persist; position and state stay, and reading starts new ones.

        Left to the garbage collector, each would be waited for several seconds.
        """
        self._reader.close()

    def num_samples_ahead(self, num_batches: int) -> list[int] | None:
        """Samples over all ranks in each of the next batches, as far as the epoch goes.

        None if the loader cannot tell.
        """
        epoch = self._read_as(self.epoch)
        return self._reader.num_samples_ahead(epoch, self._position, num_batches)

    def __iter__(self) -> Generator[Any, None, None]:
        reader, epoch = self._reader, self._read_as(self.epoch)
        with closing(
            reader.read(epoch, self._position, looks_ahead=self.looks_ahead)
        ) as handed_out:
            for handed in handed_out:
                self.num_samples, self.num_samples_all_ranks = handed[2:4]
                self.is_last, self._units = handed[4:]
                self._position += handed.advance
                yield handed.batch
        self._start_epoch(self.epoch + 1)

    def state_dict(self) -> dict[str, Any]:
        """Epoch, position and what is needed to continue there; differs by rank for iterables."""
        return {
            "epoch": self.epoch,
            "position": self._position,
            "unit": self._reader.unit,
            "seed": self._seed,
            "length": self.length,
            **self._reader.state(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any], allow: Collection[str] = ()) -> None:
        """Continue where another loader of the same data stood.

        Args:
            state_dict: what `state_dict` gave; it is not changed.
            allow: what may differ from the state, with a warning that says what it means:
                ``"seed"``, ``"dataset_length"``. The loader goes on with its own, at the same
                position; one behind the end of its data ends the epoch.

        Raises:
            StateError: the state is of another kind of loader, or of a seed or length that differs
                and is not allowed to.
        """
        problems = self._problems_of_kind(state_dict)
        differences = {} if problems else self._differences(state_dict)
        refused = [name for name in differences if name not in allow]
        problems += [differences[name] for name in refused]
        if problems:
            move = "Continue with the same data and seed"
            if refused:
                names = ", ".join(map(repr, refused))
                move += f", or allow it by name: checkpoint_parameters.allow_changed=[{names}]"
            raise StateError("dataloader", problems, f"{move}.")
        for name, difference in differences.items():
            warnings.warn(f"dataloader: {difference}. {_MEANING[name]}", stacklevel=2)
        if self._seed is None and state_dict["seed"] is not None:
            self._seed = state_dict["seed"]
            self._place = replace(self._place, seed=self._seed)
            self._reader.attach(self._place)
        self._start_epoch(state_dict["epoch"])
        self._position = state_dict["position"]
        if not self._repeats or self._position:
            # An epoch that repeats begins where the first did, not where the one before it ended.
            self._reader.load(state_dict)

    def _problems_of_kind(self, state: Mapping[str, Any]) -> list[str]:
        unit = self._reader.unit
        if state["unit"] != unit:
            return [
                f"the state counts {state['unit']}, this loader {unit}: "
                "it was saved from another kind of loader"
            ]
        return self._reader.problems(state)

    def _differences(self, state: Mapping[str, Any]) -> dict[str, str]:
        found = {}
        if None not in (self._seed, state["seed"]) and self._seed != state["seed"]:
            found["seed"] = f"seed {state['seed']} in the state, {self._seed} here"
        then, length = state.get("length"), self._reader.length(self._read_as(state["epoch"]))
        if None not in (then, length) and then != length:
            found["dataset_length"] = f"{then} {self._reader.unit} in the state, {length} here"
        return found

    def _start_epoch(self, epoch: int) -> None:
        self._reader.start_epoch()
        self.epoch, self._position = epoch, 0
        if self._repeats:
            self._reader.rewind()

    def _read_as(self, epoch: int) -> int:
        """The epoch whose order and draws an epoch has."""
        return 0 if self._repeats else epoch


_MEANING = {
    "seed": "The rest of the epoch comes in the order of the new seed: some samples a second time, "
    "others not at all.",
    "dataset_length": "The rest of the epoch comes in the order of the new data, from the same "
    "position on: some samples may come a second time, others not at all.",
}


def _refuse_chance(loader: Any) -> None:
    """Refuse what lets two readings of one loader differ.

    Raises:
        ConfigError: with all problems at once.
    """
    if hasattr(loader, "state_dict"):
        return
    if not isinstance(loader, DataLoader):
        sampler = getattr(loader, "sampler", None)
        if isinstance(sampler, DistributedSampler) and sampler.shuffle:
            # Fabric's wrapper does: a continued run would shuffle as its first epoch did.
            raise ConfigError(
                type(loader).__name__,
                ["it counts the epochs that it shuffles by from 0 in every process"],
                "Hand over the DataLoader itself, not what setup_dataloaders made of it: it is "
                "divided over the ranks, and batches are moved to the device, all the same.",
            )
        return
    problems = []
    if loader.num_workers and not getattr(loader, "in_order", True):
        problems.append("in_order=False hands out batches in the order in which workers finish")
    problems += [
        f"{name} is a generator, which can be read once: there is no second epoch"
        for name in ("sampler", "batch_sampler")
        if isinstance(getattr(loader, name), GeneratorType)
    ]
    if problems:
        raise ConfigError(
            type(loader).__name__, problems, "An order that can be continued can be repeated."
        )
