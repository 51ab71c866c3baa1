"""Generators that data sets, samplers and iterables keep: fixed by seed, epoch and place too."""

from __future__ import annotations

import functools
import random
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info

from dream_trainer.data import ResumableLoader
from dream_trainer.data.own_generators import (
    MAX_ENTRIES,
    own_generators,
    preserved_generators,
    seed_generators,
)
from dream_trainer.errors import ConfigError

# These tests draw, and seed, on their own.
pytestmark = pytest.mark.may_leave("rng")


def draw(generator: Any) -> float:
    """One number of whatever kind of generator."""
    if isinstance(generator, torch.Generator):
        return float(torch.rand((), generator=generator, dtype=torch.float64))
    return float(generator.random())


#: Unseeded, as a user makes them: two of a kind draw differently.
KINDS: dict[str, Callable[[], Any]] = {
    "random": random.Random,
    "numpy": np.random.default_rng,
    "numpy, PCG64DXSM": lambda: np.random.Generator(np.random.PCG64DXSM()),
    "numpy, Philox": lambda: np.random.Generator(np.random.Philox()),
    "numpy, legacy": np.random.RandomState,
    "torch": lambda: torch.Generator().manual_seed(random.SystemRandom().getrandbits(40)),
}


class Slotted:
    __slots__ = ("generator",)

    def __init__(self, generator: Any) -> None:
        self.generator = generator

    def draw(self) -> float:
        return draw(self.generator)


class Held:
    def __init__(self, generator: Any) -> None:
        self.anything = generator

    def draw(self) -> float:
        return draw(self.anything)


def closure(generator: Any) -> Callable[[], float]:
    return lambda: draw(generator)


#: Ways to keep a generator, each as a function that draws from it.
PLACES: dict[str, Callable[[Any], Callable[[], float]]] = {
    "attribute": lambda generator: Held(generator).draw,
    "slot": lambda generator: Slotted(generator).draw,
    "closure": closure,
    "partial": lambda generator: functools.partial(draw, generator),
}


class Noisy(Dataset[tuple[int, float]]):
    """Draws from what its transforms keep."""

    def __init__(self, transforms: Any, length: int = 10) -> None:
        self.length, self.transforms = length, {"train": [transforms]}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[int, float]:
        return index, self.transforms["train"][0]()


def resumable(loader: Any, **place: int) -> ResumableLoader:
    return ResumableLoader(loader, seed=3).attach(**place)


def plain(batch: Any) -> Any:
    if isinstance(batch, torch.Tensor):
        return batch.tolist()
    return tuple(map(plain, batch)) if isinstance(batch, (list, tuple)) else batch


def epoch_of(one: ResumableLoader) -> list[Any]:
    return [plain(batch) for batch in one]


def take(one: ResumableLoader, count: int) -> list[Any]:
    taken = []
    for batch in one:
        taken.append(plain(batch))
        if len(taken) == count:
            break
    return taken


def continued_at(make: Callable[[], ResumableLoader], count: int) -> list[Any]:
    """Two epochs, stopped after ``count`` batches and continued by another loader."""
    stopped = make()
    before = take(stopped, count)
    after = make()
    after.load_state_dict(stopped.state_dict())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* has no state_dict")
        return [before + epoch_of(after), epoch_of(after)]


# ---------------------------------------------------------------------- finding


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_generator_is_found_and_seeded_wherever_it_is_kept(kind: str, place: str) -> None:
    def drawn() -> float:
        transform = PLACES[place](KINDS[kind]())
        seed_generators(own_generators(Noisy(transform)), 5)
        return transform()

    assert drawn() == drawn()


@pytest.mark.parametrize("kind", KINDS)
def test_generators_are_put_back(kind: str) -> None:
    generator = KINDS[kind]()
    seed_generators([generator], 5)
    expected = [draw(generator) for _ in range(3)]
    seed_generators([generator], 5)
    draw(generator)
    with preserved_generators([generator]):
        seed_generators([generator], 6)
        draw(generator)
    assert [draw(generator) for _ in range(2)] == expected[1:]


def test_several_generators_draw_differently_and_a_shared_one_is_seeded_once() -> None:
    shared = random.Random()
    both = own_generators([shared, np.random.default_rng(), random.Random(), shared])
    assert len(both) == 3
    seed_generators(both, 5)
    assert len({draw(one) for one in both}) == 3


def test_the_global_generators_and_those_of_the_system_are_nobodys_own() -> None:
    legacy = np.random.mtrand._rand  # what scikit-learn's check_random_state(None) returns
    mine = [legacy, torch.default_generator, random._inst, random.SystemRandom(), random]
    assert own_generators(mine) == []


def test_long_lists_are_data_and_are_not_searched() -> None:
    assert len(own_generators([random.Random() for _ in range(MAX_ENTRIES)])) == MAX_ENTRIES
    assert own_generators([random.Random() for _ in range(MAX_ENTRIES + 1)]) == []


def test_no_code_of_the_users_runs_while_searching() -> None:
    class Touchy:
        def __init__(self) -> None:
            self.me = self
            self.generator = random.Random()

        @property
        def lazy(self) -> Any:
            raise AssertionError("a property ran")

        def __getattr__(self, name: str) -> Any:
            raise AssertionError(f"__getattr__({name!r}) ran")

        def __eq__(self, other: object) -> bool:
            raise AssertionError("== ran")

        __hash__ = None  # type: ignore[assignment]

    assert len(own_generators(Touchy())) == 1


# ---------------------------------------------------------------------- data sets


@pytest.mark.parametrize("place", ["attribute", "closure"])
@pytest.mark.parametrize("kind", KINDS)
def test_draws_of_a_data_sets_own_generator_depend_on_the_sample_alone(
    kind: str, place: str
) -> None:
    def make(workers: int = 0, batch_size: int = 4) -> ResumableLoader:
        data = Noisy(PLACES[place](KINDS[kind]()))
        return resumable(DataLoader(data, batch_size, shuffle=True, num_workers=workers))

    def by_index(one: ResumableLoader) -> dict[int, float]:
        return {i: noise for batch in one for i, noise in zip(*plain(batch), strict=True)}

    one = make()
    first, second = by_index(one), by_index(one)
    assert len({*first.values(), *second.values()}) == 20
    assert by_index(make(batch_size=3)) == first
    assert by_index(make(workers=2)) == first
    one.rewind()
    whole = [epoch_of(one), epoch_of(one)]
    assert continued_at(make, 2) == whole


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_that_persist_seed_them_in_every_epoch(persistent: bool) -> None:
    data = Noisy(PLACES["attribute"](random.Random()))
    loader = DataLoader(data, 4, num_workers=2, persistent_workers=persistent)
    one = resumable(loader)
    other = resumable(DataLoader(Noisy(PLACES["attribute"](random.Random())), 4))
    for _ in range(3):
        assert epoch_of(one) == epoch_of(other)


@pytest.mark.parametrize("kind", KINDS)
def test_in_the_main_process_a_generator_is_left_as_it_was(kind: str) -> None:
    generator = KINDS[kind]()
    seed_generators([generator], 5)
    expected = draw(generator)
    seed_generators([generator], 5)
    one = resumable(DataLoader(Noisy(closure(generator)), 4))
    take(one, 1)
    epoch_of(one)
    assert draw(generator) == expected


def test_a_generator_that_replaces_another_is_seeded_from_the_next_epoch_on() -> None:
    data = Noisy(closure(random.Random()))
    one = resumable(DataLoader(data, 4))
    whole = [epoch_of(one), epoch_of(one)]
    one.rewind()
    first = epoch_of(one)
    data.transforms["train"] = [closure(random.Random())]
    assert [first, epoch_of(one)] == whole


def test_a_generator_of_the_collate_fn_is_fixed_by_the_first_sample() -> None:
    class Collate:
        def __init__(self) -> None:
            self.rng = np.random.default_rng()

        def __call__(self, rows: list[int]) -> tuple[list[int], float]:
            return rows, draw(self.rng)

    def make(workers: int = 0) -> ResumableLoader:
        return resumable(DataLoader(range(10), 4, num_workers=workers, collate_fn=Collate()))  # type: ignore[arg-type]

    one = make()
    whole = [epoch_of(one), epoch_of(one)]
    assert epoch_of(make(workers=2)) == whole[0]
    assert continued_at(make, 1) == whole


def test_switched_off_they_are_left_alone() -> None:
    expected = [random.Random(5).random()]
    loader = DataLoader(Noisy(closure(random.Random(5)), 1))
    assert epoch_of(ResumableLoader(loader, seed=3, seed_samples=False)) == [([0], expected)]


MODULE_LEVEL = random.Random()


def test_a_generator_of_a_module_is_not_seen() -> None:
    """The limit that docs/data.md names."""

    class Draws(Dataset[float]):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> float:
            return MODULE_LEVEL.random()

    one = resumable(DataLoader(Draws(), 4))
    first = epoch_of(one)
    one.rewind()
    assert epoch_of(one) != first


# ---------------------------------------------------------------------- samplers


class Shuffled(Sampler[int]):
    """Draws from a generator of its own, and shuffles in place."""

    def __init__(self, generator: Any, length: int = 10) -> None:
        self.data_source = range(length)
        self.any_name = {"rng": generator}
        self.indices = list(range(length))
        self.num_epochs = 0

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        self.num_epochs += 1
        generator = self.any_name["rng"]
        self.indices.sort(key=lambda index: draw(generator))
        yield from self.indices[self.num_epochs :] + self.indices[: self.num_epochs]


class InBatches(Sampler[list[int]]):
    """Batches of what another sampler gives, in one list that is filled again and again."""

    def __init__(self, sampler: Sampler[int]) -> None:
        self.sampler = sampler

    def __iter__(self) -> Iterator[list[int]]:
        batch: list[int] = []
        for index in self.sampler:
            batch.append(index)
            if len(batch) == 3:
                yield batch
                batch.clear()
        yield batch


SAMPLERS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "sampler": lambda generator: {"sampler": Shuffled(generator), "batch_size": 3},
    "batch sampler": lambda generator: {"batch_sampler": InBatches(Shuffled(generator))},
}


@pytest.mark.parametrize("place", SAMPLERS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_a_sampler_with_a_memory_is_a_function_of_seed_and_epoch(
    kind: str, place: str
) -> None:
    def make() -> ResumableLoader:
        return resumable(DataLoader(range(10), **SAMPLERS[place](KINDS[kind]())))  # type: ignore[arg-type]

    one = make()
    whole = [epoch_of(one), epoch_of(one), epoch_of(one)]
    assert whole[0] != whole[1] != whole[2]
    assert all(sorted(i for batch in epoch for i in batch) == list(range(10)) for epoch in whole)
    backwards = make()
    for epoch in (2, 1, 0):
        backwards.set_epoch(epoch)
        assert len(backwards) == 4
        assert epoch_of(backwards) == whole[epoch]
    for count in (1, 2, 3):
        assert continued_at(make, count) == whole[:2]


def test_a_users_sampler_is_left_as_it_was_and_what_the_user_changes_counts() -> None:
    sampler = Shuffled(random.Random(5))
    one = resumable(DataLoader(range(10), sampler=sampler, batch_size=10))  # type: ignore[arg-type]
    epoch_of(one)
    assert (sampler.indices, sampler.num_epochs) == (list(range(10)), 0)
    assert sampler.any_name["rng"].getstate() == random.Random(5).getstate()
    sampler.indices = [1, 2, 3]
    (batch,) = epoch_of(one)
    assert sorted(batch) == [1, 2, 3]


def test_the_copy_of_a_sampler_shares_its_data() -> None:
    class Large(Dataset[int]):
        def __len__(self) -> int:
            return 10

        def __getitem__(self, index: int) -> int:
            return index

        def __deepcopy__(self, memo: Any) -> Any:
            raise AssertionError("the data set was copied")

    class OfOther(Shuffled):
        def __init__(self, data: Any) -> None:
            super().__init__(random.Random())
            self.data_source = data

    data, other = Large(), Large()
    one = resumable(DataLoader(data, sampler=OfOther(other), batch_size=5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        epoch_of(one)


def test_a_sampler_that_cannot_be_copied_is_asked_itself_and_that_is_said() -> None:
    class Locked(Sampler[int]):
        def __init__(self) -> None:
            self.lock, self.rng = threading.Lock(), random.Random()

        def __iter__(self) -> Iterator[int]:
            return iter(self.rng.sample(range(10), 10))

    one, other = (resumable(DataLoader(range(10), sampler=Locked())) for _ in range(2))  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="Locked cannot be copied"):
        first = epoch_of(one)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = epoch_of(one)  # said once
    other.set_epoch(1)
    with pytest.warns(UserWarning, match="Locked cannot be copied"):
        assert epoch_of(other) == second != first


def test_a_sampler_without_an_end_or_a_second_beginning_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Endless(Sampler[int]):
        def __iter__(self) -> Iterator[int]:
            while True:
                yield 0

    monkeypatch.setattr("dream_trainer.data.epoch_order._ENDLESS", 1000)
    with pytest.raises(ConfigError, match="Endless: it gave more than 1000 units in one epoch"):
        len(resumable(DataLoader(range(10), sampler=Endless())))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="sampler is a generator, which can be read once"):
        resumable(DataLoader(range(10), sampler=(i for i in range(10))))  # type: ignore[arg-type]


# ---------------------------------------------------------------------- iterables


class Stream:
    """Draws from a generator of its own, and is told the epoch."""

    def __init__(self, generator: Any) -> None:
        self.held = Held(generator)
        self.epoch = -1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[int, int, float]]:
        for index in range(5):
            yield self.epoch, index, self.held.draw()


class Shards(IterableDataset[tuple[int, float]]):
    def __init__(self, generator: Any) -> None:
        self.held = Held(generator)

    def __iter__(self) -> Iterator[tuple[int, float]]:
        info = get_worker_info()
        start, step = (info.id, info.num_workers) if info else (0, 1)
        for index in range(start, 12, step):
            yield index, self.held.draw()


ITERABLES: dict[str, Callable[[Any], Any]] = {
    "iterable": Stream,
    "iterable data set": lambda generator: DataLoader(Shards(generator), batch_size=3),
    "iterable data set, 2 workers": lambda generator: DataLoader(
        Shards(generator), batch_size=3, num_workers=2
    ),
    "iterable data set, 2 workers that persist": lambda generator: DataLoader(
        Shards(generator), batch_size=3, num_workers=2, persistent_workers=True
    ),
}


@pytest.mark.parametrize("name", ITERABLES)
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_an_iterables_own_generator_starts_each_epoch_from_seed_epoch_and_rank(
    kind: str, name: str
) -> None:
    def make(rank: int = 0) -> ResumableLoader:
        return resumable(ITERABLES[name](KINDS[kind]()), rank=rank, size=2)

    one = make()
    whole = [epoch_of(one), epoch_of(one)]
    assert whole[0] != whole[1]
    for count in range(1, len(whole[0])):
        assert continued_at(make, count) == whole
    assert epoch_of(make(rank=1)) != whole[0]


def test_the_workers_of_an_iterable_data_set_draw_differently() -> None:
    one = resumable(DataLoader(Shards(np.random.default_rng()), batch_size=None, num_workers=2))
    draws = [noise for _, noise in epoch_of(one)]
    assert len(set(draws)) == len(draws) == 12


def test_the_generator_of_the_loader_of_an_iterable_data_set_is_left_alone() -> None:
    def make(generator: torch.Generator) -> ResumableLoader:
        loader = DataLoader(Global(), batch_size=3, num_workers=1, generator=generator)
        return resumable(loader)

    generator = torch.Generator().manual_seed(5)
    before = generator.get_state()
    one, other = make(generator), make(torch.Generator().manual_seed(6))
    whole = [epoch_of(one), epoch_of(one)]
    assert [epoch_of(other), epoch_of(other)] == whole
    assert whole[0] != whole[1]
    assert torch.equal(generator.get_state(), before)


class Global(IterableDataset[float]):
    def __iter__(self) -> Iterator[float]:
        for _ in range(6):
            yield random.random()


def test_what_a_user_made_of_a_list_is_not_read_to_look_for_generators() -> None:
    class Files(list[str]):
        def __iter__(self) -> Iterator[str]:
            raise AssertionError("a file was read")

    assert own_generators(Files(["a", "b"])) == []
