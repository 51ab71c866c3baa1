"""What continuing costs, and what may differ from the run that is continued."""

from __future__ import annotations

import itertools
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from dream_trainer.data import ResumableLoader
from dream_trainer.errors import StateError

# These tests draw, and seed, on their own.
pytestmark = pytest.mark.may_leave("rng")


class Counted(Dataset[int]):
    """Counts how often each sample is read, in whatever process."""

    def __init__(self, length: int) -> None:
        self.reads = torch.zeros(length, dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.reads)

    def __getitem__(self, index: int) -> int:
        self.reads[index] += 1
        return index


class Pairs(Sampler[list[int]]):
    def __init__(self, length: int) -> None:
        self.length = length

    def __iter__(self) -> Iterator[list[int]]:
        return iter([[index, index + 1] for index in range(0, self.length, 2)])


def resumable(loader: Any, *, seed: int | None = 3, **place: int) -> ResumableLoader:
    return ResumableLoader(loader, seed=seed).attach(**place)


def take(one: ResumableLoader, count: int) -> list[Any]:
    return [batch.tolist() for batch in itertools.islice(one, count)]


def at(position: int, one: ResumableLoader) -> ResumableLoader:
    one.load_state_dict(one.state_dict() | {"position": position})
    return one


# ---------------------------------------------------------------------- cost


@pytest.mark.parametrize("workers", [0, 2])
def test_no_sample_that_was_used_is_read_again(workers: int) -> None:
    stopped = resumable(DataLoader(range(40), 4, shuffle=True))  # type: ignore[arg-type]
    used = [index for batch in take(stopped, 6) for index in batch]
    data = Counted(40)
    continued = resumable(DataLoader(data, 4, shuffle=True, num_workers=workers))
    continued.load_state_dict(stopped.state_dict())
    rest = [index for batch in take(continued, 100) for index in batch]
    assert data.reads[used].tolist() == [0] * 24
    assert data.reads[rest].tolist() == [1] * 16


OPTIONS: dict[str, Callable[[int], dict[str, Any]]] = {
    "shuffled": lambda length: {"batch_size": 2, "shuffle": True},
    "in order": lambda length: {"batch_size": 2},
    "batch sampler": lambda length: {"batch_sampler": Pairs(length)},
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_continuing_at_batch_10_and_at_batch_10_000_takes_the_same_operations(kind: str) -> None:
    length = 20_100

    def operations(batches: int) -> tuple[int, int]:
        """Samples read, and calls of functions in Python and C, up to the first batch."""
        data = Counted(length)
        one = resumable(DataLoader(data, **OPTIONS[kind](length)))
        take(one, 1)  # what is made once, and the order of the epoch
        state = one.state_dict() | {"position": 2 * batches}
        calls = [0]

        def count(frame: Any, event: str, argument: Any) -> None:
            calls[0] += event in ("call", "c_call")

        data.reads.zero_()
        sys.setprofile(count)
        try:
            one.load_state_dict(state)
            next(iter(one))
        finally:
            sys.setprofile(None)
        return int(data.reads.sum()), calls[0]

    few, many = operations(10), operations(10_000)
    assert few[0] == many[0] == 2
    # Finding the place of a custom batch is a binary search, within one call.
    assert few == many


def test_loading_a_state_reads_nothing() -> None:
    data = Counted(40)
    at(20, resumable(DataLoader(data, 4, shuffle=True)))
    assert int(data.reads.sum()) == 0


# ---------------------------------------------------------------------- differences by name


def stopped_at_8(length: int = 20, seed: int = 3) -> dict[str, Any]:
    return at(8, resumable(DataLoader(range(length), 4, shuffle=True), seed=seed)).state_dict()  # type: ignore[arg-type]


def test_another_seed_is_allowed_by_name_and_the_loader_keeps_its_own() -> None:
    one = resumable(DataLoader(range(20), 4, shuffle=True), seed=4)  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="dataloader: seed 3 in the state, 4 here. The rest of"):
        one.load_state_dict(stopped_at_8(), allow=["seed"])
    rest = take(one, 100)
    fresh = resumable(DataLoader(range(20), 4, shuffle=True), seed=4)  # type: ignore[arg-type]
    assert rest == take(fresh, 100)[2:]


@pytest.mark.parametrize(("length", "batches"), [(6, []), (8, []), (10, [2]), (30, [4] * 5 + [2])])
def test_another_length_is_allowed_by_name_and_a_position_behind_the_end_ends_the_epoch(
    length: int, batches: list[int]
) -> None:
    one = resumable(DataLoader(range(length), 4, shuffle=True))  # type: ignore[arg-type]
    message = f"dataloader: 20 samples in the state, {length} here. The rest of the epoch"
    with pytest.warns(UserWarning, match=message):
        one.load_state_dict(stopped_at_8(), allow={"dataset_length", "of something else"})
    assert [len(batch) for batch in take(one, 100)] == batches
    assert one.epoch == 1
    fresh = resumable(DataLoader(range(length), 4, shuffle=True))  # type: ignore[arg-type]
    fresh.set_epoch(1)
    assert take(one, 100) == take(fresh, 100)


@pytest.mark.filterwarnings("error")  # nothing is loaded, so nothing is warned of
@pytest.mark.parametrize(
    ("allow", "refused"),
    [
        ((), "['seed', 'dataset_length']"),
        (("seed",), "['dataset_length']"),
        (("dataset_length",), "['seed']"),
    ],
)
def test_what_is_not_allowed_is_refused_with_the_name_that_would_allow_it(
    allow: tuple[str, ...], refused: str
) -> None:
    one = resumable(DataLoader(range(21), 4), seed=4)  # type: ignore[arg-type]
    before = one.state_dict()
    with pytest.raises(StateError) as caught:
        one.load_state_dict(stopped_at_8(), allow=allow)
    assert str(caught.value).endswith(
        "Continue with the same data and seed, or allow it by name: "
        f"checkpoint_parameters.allow_changed={refused}."
    )
    assert one.state_dict() == before


def test_a_length_of_batches_is_compared_too() -> None:
    state = resumable([1, 2, 3]).state_dict()
    with pytest.raises(StateError, match="3 batches in the state, 4 here"):
        resumable([1, 2, 3, 4]).load_state_dict(state)
    with pytest.warns(UserWarning, match="3 batches in the state, 4 here"):
        resumable([1, 2, 3, 4]).load_state_dict(state, allow=["dataset_length"])


class WithState:
    def __iter__(self) -> Iterator[int]:
        return iter([1, 2])

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""


class Plain:
    def __iter__(self) -> Iterator[int]:
        return iter([1, 2])


KINDS: dict[str, Callable[[], Any]] = {
    "samples": lambda: DataLoader(range(4)),  # type: ignore[arg-type]
    "batches": Plain,
    "own state": WithState,
}


@pytest.mark.parametrize(("one", "other"), list(itertools.permutations(KINDS, 2)))
def test_a_state_of_another_kind_of_loader_is_refused_whatever_is_allowed(
    one: str, other: str
) -> None:
    state = resumable(KINDS[one]()).state_dict()
    loader = resumable(KINDS[other]())
    with pytest.raises(StateError, match=r"the state (counts|is of a loader)") as caught:
        loader.load_state_dict(state, allow=["seed", "dataset_length"])
    assert str(caught.value).endswith("Continue with the same data and seed.")


def test_a_refused_state_leaves_a_loader_without_a_seed_without_one() -> None:
    one = ResumableLoader([1, 2])
    with pytest.raises(StateError):
        one.load_state_dict(ResumableLoader([1], seed=5).state_dict())
    assert one.state_dict()["seed"] is None


# ---------------------------------------------------------------------- other ranks


def test_an_iterable_that_goes_on_on_other_ranks_says_what_that_means() -> None:
    stopped = resumable(Plain(), rank=1, size=2)
    next(iter(stopped))
    other = resumable(Plain(), rank=2, size=4)
    with pytest.warns(UserWarning, match="rank 2 of 4 continues where rank 1 of 2 was in its own"):
        other.load_state_dict(stopped.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # at an epoch's beginning nothing is lost
        other.load_state_dict(resumable(Plain(), rank=1, size=2).state_dict())
