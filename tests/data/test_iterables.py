"""Iterables of every kind: with and without length, with and without a state."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from dream_trainer.data import ResumableLoader
from dream_trainer.errors import StateError

# These tests draw, and seed, on their own.
pytestmark = pytest.mark.may_leave("rng")


class Stream:
    """Draws as it goes; cannot tell its length."""

    def __init__(self, length: int = 5) -> None:
        self.length = length

    def __iter__(self) -> Iterator[tuple[int, float, float]]:
        for index in range(self.length):
            yield index, random.random(), float(torch.rand(()))


class Sized(Stream):
    def __len__(self) -> int:
        return self.length


class Stateful(Stream):
    """Keeps its position itself, and starts anew after the last item."""

    def __init__(self, length: int = 5) -> None:
        super().__init__(length)
        self.at = 0
        self.read: list[int] = []

    def __iter__(self) -> Iterator[tuple[int, float, float]]:
        while self.at < self.length:
            self.at += 1
            self.read.append(self.at - 1)
            yield self.at - 1, random.random(), float(torch.rand(()))
        self.at = 0

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


class DrawsWhenOpened(Stateful):
    """As loaders do that draw a seed for their workers."""

    def __iter__(self) -> Iterator[tuple[int, float, float]]:
        opened = random.random()
        return ((index, opened, last) for index, _, last in super().__iter__())


class Shards(IterableDataset[tuple[int, float]]):
    def __iter__(self) -> Iterator[tuple[int, float]]:
        info = get_worker_info()
        start, step = (info.id, info.num_workers) if info else (0, 1)
        for index in range(start, 12, step):
            yield index, random.random()


def resumable(loader: Any, *, looks_ahead: bool = False, rank: int = 0) -> ResumableLoader:
    one = ResumableLoader(loader, seed=3)
    return one.attach(rank=rank, size=2, looks_ahead=looks_ahead)


def plain(item: Any) -> Any:
    if isinstance(item, torch.Tensor):
        return item.tolist()
    return tuple(map(plain, item)) if isinstance(item, (list, tuple)) else item


def epoch_of(one: ResumableLoader) -> list[Any]:
    return [plain(item) for item in one]


def take(one: ResumableLoader, count: int) -> list[Any]:
    taken = []
    if count:
        for item in one:
            taken.append(plain(item))
            if len(taken) == count:
                break
    return taken


KINDS = {
    "stream": Stream,
    "sized": Sized,
    "stateful": Stateful,
    "stateful, draws when opened": DrawsWhenOpened,
    "list": lambda: [10, 20, 30, 40, 50],
    "iterable data set": lambda: DataLoader(Shards(), batch_size=3),
    "iterable data set, 2 workers": lambda: DataLoader(Shards(), batch_size=3, num_workers=2),
}


@pytest.mark.parametrize("looks_ahead", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_it_continues_at_every_item_with_the_same_draws(kind: str, looks_ahead: bool) -> None:
    one = resumable(KINDS[kind](), looks_ahead=looks_ahead)
    whole = [epoch_of(one), epoch_of(one)]
    assert kind == "list" or whole[0] != whole[1]
    for count in range(len(whole[0])):
        stopped = resumable(KINDS[kind](), looks_ahead=looks_ahead)
        before = take(stopped, count)
        state = copy.deepcopy(stopped.state_dict())
        random.seed(count)
        torch.manual_seed(count)
        continued = resumable(KINDS[kind](), looks_ahead=looks_ahead)
        continued.load_state_dict(state)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".* has no state_dict")
            rest = epoch_of(continued)
        assert [before + rest, epoch_of(continued)] == whole, count


@pytest.mark.parametrize("looks_ahead", [False, True])
@pytest.mark.parametrize("kind", ["stream", "stateful", "list"])
def test_it_continues_in_the_same_process_too(kind: str, looks_ahead: bool) -> None:
    whole = epoch_of(resumable(KINDS[kind]()))
    one = resumable(KINDS[kind](), looks_ahead=looks_ahead)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* has no state_dict")
        assert take(one, 2) + epoch_of(one) == whole


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("untouched_rng")
def test_the_streams_of_the_run_are_untouched(kind: str) -> None:
    one = resumable(KINDS[kind](), looks_ahead=True)
    take(one, 1)
    one.rewind()
    epoch_of(one)


def test_ranks_draw_differently() -> None:
    assert epoch_of(resumable(Stream(), rank=0)) != epoch_of(resumable(Stream(), rank=1))


def test_skipping_says_what_it_costs_and_a_state_spares_it() -> None:
    stopped = resumable(Stream())
    take(stopped, 3)
    continued = resumable(Stream())
    continued.load_state_dict(stopped.state_dict())
    with pytest.warns(UserWarning, match="Stream has no state_dict: continuing reads and drops 3"):
        take(continued, 1)

    stopped = resumable(Stateful())
    take(stopped, 3)
    inner = Stateful()
    continued = resumable(inner)
    continued.load_state_dict(stopped.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        epoch_of(continued)
    assert inner.read == [3, 4]


def test_only_a_sequence_can_tell_its_length() -> None:
    assert len(resumable([1, 2, 3])) == 3
    one = resumable(Stream())
    assert one.num_batches is None
    with pytest.raises(TypeError, match="Stream cannot tell its length"):
        len(one)


def test_the_last_item_is_known_by_looking_ahead_or_of_a_sequence() -> None:
    def lasts(one: ResumableLoader) -> list[bool | None]:
        return [one.is_last for _ in one]

    assert lasts(resumable(Stream(3))) == [None, None, None]
    assert lasts(resumable(Stream(3), looks_ahead=True)) == [False, False, True]
    assert lasts(resumable(Stateful(3), looks_ahead=True)) == [False, False, True]
    assert lasts(resumable([1, 2, 3])) == [False, False, True]
    assert lasts(resumable([], looks_ahead=True)) == []
    assert lasts(resumable(Stream(0), looks_ahead=True)) == []


def test_samples_of_an_iterable_are_not_counted() -> None:
    one = resumable(Stream(2))
    assert [(one.num_samples, one.num_samples_all_ranks) for _ in one] == [(None, None)] * 2
    assert one.num_samples_ahead(3) is None


def test_an_item_that_is_only_looked_at_is_not_in_the_state() -> None:
    one = resumable(Stateful(), looks_ahead=True)
    take(one, 2)
    assert one.loader.at == 3
    assert one.state_dict()["loader"] == {"at": 2}
    assert one.state_dict()["position"] == 2


@pytest.mark.parametrize("looks_ahead", [False, True])
def test_no_rank_goes_on_when_another_has_run_out(looks_ahead: bool) -> None:
    calls = []

    def third_is_the_end(mine: bool) -> bool:
        calls.append(mine)
        return mine or len(calls) == 3

    one = ResumableLoader(Stream(5), seed=3)
    one.attach(size=2, looks_ahead=looks_ahead, any_rank=third_is_the_end)
    assert len(epoch_of(one)) == 2
    assert calls == [False, False, False]


def test_an_error_of_the_users_arrives_as_it_was_raised() -> None:
    def breaks() -> Iterator[int]:
        yield 1
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        epoch_of(resumable(breaks()))


def test_the_state_of_a_loader_is_kept_apart_from_the_loader() -> None:
    stopped = resumable(Stateful())
    take(stopped, 2)
    state = stopped.state_dict()
    kept = copy.deepcopy(state["loader"])
    continued = resumable(Stateful())
    continued.load_state_dict(state)
    epoch_of(continued)
    assert state["loader"] == kept


def test_a_state_of_a_map_style_loader_is_refused() -> None:
    state = ResumableLoader(DataLoader(range(4)), seed=3).state_dict()
    with pytest.raises(StateError, match="the state counts samples, this loader batches"):
        resumable(Stream()).load_state_dict(state)


def test_another_seed_is_refused() -> None:
    state = ResumableLoader(Stream(), seed=4).state_dict()
    with pytest.raises(StateError, match="seed 4 in the state, 3 here"):
        resumable(Stream()).load_state_dict(state)
