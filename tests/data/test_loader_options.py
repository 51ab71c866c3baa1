"""Every option of a user's DataLoader reaches the one that is read, or is refused."""

from __future__ import annotations

import inspect
import itertools
import multiprocessing
import os
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    WeightedRandomSampler,
    get_worker_info,
)

from dream_trainer.data import ResumableLoader
from dream_trainer.errors import ConfigError

# These tests draw, and seed, on their own.
pytestmark = pytest.mark.may_leave("rng")


class Numbers(Dataset[int]):
    def __init__(self, length: int = 10) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        return index


def resumable(loader: Any, **place: int) -> ResumableLoader:
    return ResumableLoader(loader, seed=3).attach(**place)


def plain(batch: Any) -> Any:
    if isinstance(batch, torch.Tensor):
        return batch.tolist()
    return tuple(map(plain, batch)) if isinstance(batch, (list, tuple)) else batch


def epoch_of(one: ResumableLoader) -> list[Any]:
    return [plain(batch) for batch in one]


def take(one: ResumableLoader, count: int) -> list[Any]:
    return [plain(batch) for batch in itertools.islice(one, count)]


# ---------------------------------------------------------------------- options


class Seen(DataLoader[Any]):
    """Keeps itself when it is asked to iterate, as DataLoader does with all of its options."""

    seen: DataLoader[Any]

    def _get_iterator(self) -> Any:
        type(self).seen = self
        return super()._get_iterator()


def own_collate(rows: list[Any]) -> Any:
    return rows


def own_init(worker_id: int) -> None:
    """Does nothing."""


#: For every parameter of DataLoader a value that is not the default, and what else that needs.
OPTIONS: dict[str, tuple[Any, dict[str, Any]]] = {
    "num_workers": (1, {}),
    "collate_fn": (own_collate, {}),
    "pin_memory": (True, {}),
    "timeout": (7.0, {"num_workers": 1}),
    "worker_init_fn": (own_init, {"num_workers": 1}),
    "multiprocessing_context": ("fork", {"num_workers": 1}),
    "prefetch_factor": (5, {"num_workers": 1}),
    "persistent_workers": (True, {"num_workers": 1}),
    "pin_memory_device": ("cpu", {}),
    "in_order": (False, {}),  # means something with workers only, and is refused there
}
#: What decides on the order: tested by what is read.
ORDER = {"dataset", "batch_size", "shuffle", "sampler", "batch_sampler", "drop_last", "generator"}


def test_no_option_is_forgotten() -> None:
    parameters = set(inspect.signature(DataLoader.__init__).parameters) - {"self"}
    assert parameters == ORDER | OPTIONS.keys()


@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
@pytest.mark.filterwarnings("ignore:.*pin_memory.*:DeprecationWarning")
@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_reaches_the_loader_that_is_read(name: str) -> None:
    value, others = OPTIONS[name]
    loader = Seen(Numbers(), batch_size=4, **{name: value} | others)
    given = dict(vars(loader))
    assert len(epoch_of(resumable(loader))) == 3
    assert vars(loader) == given, "the user's loader was changed"
    found = getattr(Seen.seen, name)
    del Seen.seen  # with its workers
    if name == "multiprocessing_context":
        assert found.get_start_method() == value
    elif name not in ("collate_fn", "worker_init_fn"):  # these are called by ours
        assert found == value


def test_batches_in_the_order_in_which_workers_finish_are_refused() -> None:
    loader = DataLoader(Numbers(), num_workers=2, in_order=False)
    with pytest.raises(ConfigError, match="in_order=False hands out batches in the order in which"):
        ResumableLoader(loader)


def test_it_reads_the_same_in_a_worker_that_is_spawned() -> None:
    def make(**options: Any) -> ResumableLoader:
        return resumable(DataLoader(Numbers(), 4, shuffle=True, **options))

    workers = make(num_workers=1, multiprocessing_context="spawn", worker_init_fn=own_init)
    assert epoch_of(workers) == epoch_of(make())


class PerWorker(Numbers):
    """Opened in each worker, as files are."""

    opened = -1
    _pid = -1

    def __getitem__(self, index: int) -> tuple[int, int, bool]:
        info = get_worker_info()
        assert info is not None
        return index, self.opened, self._pid == os.getpid() and info.dataset is self


def opens(worker_id: int) -> None:
    info = get_worker_info()
    assert info is not None
    assert isinstance(info.dataset, PerWorker)
    info.dataset.opened, info.dataset._pid = worker_id, os.getpid()


def test_a_worker_init_fn_finds_the_users_own_data_set() -> None:
    loader = DataLoader(PerWorker(8), 4, num_workers=2, worker_init_fn=opens)
    rows = [row for batch in resumable(loader) for row in zip(*plain(batch), strict=True)]
    assert rows == [(index, index // 4, True) for index in range(8)]


def test_workers_of_different_ranks_have_different_seeds() -> None:
    class Seed(Numbers):
        def __getitem__(self, index: int) -> int:
            info = get_worker_info()
            assert info is not None
            return info.seed

    loader = DataLoader(Seed(4), 1, num_workers=2)
    seeds = [seed for rank in (0, 1) for (seed,) in epoch_of(resumable(loader, rank=rank, size=2))]
    assert len(set(seeds)) == 4


def test_a_batch_may_be_none() -> None:
    def without_fives(rows: list[int]) -> Any:
        return [row for row in rows if row % 5] or None

    loader = DataLoader(Numbers(12), 2, sampler=[0, 5, 1, 2, 5, 10, 3, 4], collate_fn=without_fives)
    whole = epoch_of(resumable(loader))
    assert whole == [None, (1, 2), None, (3, 4)]
    for count in range(1, 4):
        stopped, continued = resumable(loader), resumable(loader)
        assert take(stopped, count) == whole[:count]
        continued.load_state_dict(stopped.state_dict())
        assert epoch_of(continued) == whole[count:]


def test_an_empty_batch_reaches_the_users_collate_fn() -> None:
    class Some(Sampler[list[int]]):
        def __iter__(self) -> Iterator[list[int]]:
            return iter([[1, 2], [], [3]])

    loader = DataLoader(Numbers(), batch_sampler=Some(), collate_fn=own_collate)
    assert epoch_of(resumable(loader)) == [(1, 2), (), (3,)]


# ---------------------------------------------------------------------- without batches


class Bulk(Numbers):
    """Reads a list of indices at once."""

    def __getitem__(self, index: Any) -> Any:
        assert isinstance(index, list)
        return torch.tensor(index)


class Pairs(BatchSampler):
    """One of a user's own."""


def test_closing_ends_the_workers_that_persist_and_reading_starts_new_ones() -> None:
    one = resumable(DataLoader(Numbers(), 2, num_workers=2, persistent_workers=True))
    before = take(one, 2)
    assert len(multiprocessing.active_children()) == 2
    one.close()
    assert multiprocessing.active_children() == []
    one.close()
    assert before + epoch_of(one) == epoch_of(resumable(DataLoader(Numbers(), 2)))
    one.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_set_that_reads_many_at_once_is_divided_by_samples(workers: int) -> None:
    """``batch_size=None`` with a batch sampler as sampler, as torch documents it."""

    def make(kind: type[BatchSampler], **place: int) -> ResumableLoader:
        sampler = kind(RandomSampler(range(11)), 4, drop_last=False)
        loader = DataLoader(Bulk(11), batch_size=None, sampler=sampler, num_workers=workers)
        return resumable(loader, **place)

    whole = epoch_of(make(BatchSampler))
    order = [index for batch in whole for index in batch]
    assert [len(batch) for batch in whole] == [4, 4, 3]
    assert sorted(order) == list(range(11))
    stopped = make(BatchSampler)
    assert take(stopped, 1) == whole[:1]
    assert stopped.state_dict()["position"] == 4
    both = []
    for rank in range(2):
        one = make(BatchSampler, rank=rank, size=2)
        one.load_state_dict(stopped.state_dict())
        both.append(epoch_of(one))
    assert both == [[order[4:8]], [order[8:]]]
    dealt = make(Pairs)
    assert [(plain(b), dealt.num_samples) for b in dealt] == [
        (b, len(b)) for b in epoch_of(make(Pairs))
    ]


def test_without_batches_a_data_set_is_asked_for_what_the_sampler_gives() -> None:
    class ByName(Dataset[str]):
        def __getitem__(self, name: str) -> str:
            return name.upper() + f"{random.random():.9f}"

    loader = DataLoader(ByName(), batch_size=None, sampler=["a", "b"])  # type: ignore[arg-type]
    one = resumable(loader)
    first = epoch_of(one)
    assert [name[0] for name in first] == ["A", "B"]
    one.rewind()
    assert epoch_of(one) == first


# ---------------------------------------------------------------------- samplers


@pytest.mark.parametrize("length", [3, 30])
@pytest.mark.parametrize("kind", ["weighted", "random"])
def test_samplers_may_be_shorter_or_longer_than_the_data(kind: str, length: int) -> None:
    def make(**place: int) -> ResumableLoader:
        sampler: Any = (
            WeightedRandomSampler(range(1, 11), length, replacement=True)
            if kind == "weighted"
            else RandomSampler(range(10), replacement=True, num_samples=length)
        )
        return resumable(DataLoader(Numbers(), 4, sampler=sampler), **place)

    order = [index for batch in epoch_of(make()) for index in batch]
    assert len(order) == make().length == length
    ranks = [make(rank=rank, size=2) for rank in range(2)]
    seen: list[int] = []
    for batches in zip(*ranks, strict=True):
        for one, batch in zip(ranks, batches, strict=True):
            seen += plain(batch)[: one.num_samples]
    assert seen == order


def test_an_index_of_any_integer_type_draws_alike() -> None:
    class Draws(Numbers):
        def __getitem__(self, index: int) -> tuple[int, float]:
            return int(index), random.random()

    kinds: list[Any] = [int, np.int64, np.uint8, torch.tensor]
    epochs = [
        epoch_of(resumable(DataLoader(Draws(), 5, sampler=[kind(i) for i in range(10)])))
        for kind in kinds
    ]
    assert epochs[0] == epochs[1] == epochs[2] == epochs[3]


def test_batches_that_share_one_list_are_kept_apart() -> None:
    class Reuses(Sampler[list[int]]):
        def __iter__(self) -> Iterator[list[int]]:
            batch = [0, 0]
            for index in range(0, 6, 2):
                batch[:] = index, index + 1
                yield batch

    assert epoch_of(resumable(DataLoader(Numbers(), batch_sampler=Reuses()))) == [
        [0, 1],
        [2, 3],
        [4, 5],
    ]


# ---------------------------------------------------------------------- subclasses


class Doubles(DataLoader[Any]):
    """What a user does to every batch, as in prefetching to a device."""

    def __iter__(self) -> Any:
        return (batch * 2 for batch in super().__iter__())


class LooksAhead(DataLoader[Any]):
    def __iter__(self) -> Any:
        last = None
        for batch in super().__iter__():
            if last is not None:
                yield last
            last = batch
        yield last


class ByLength(DataLoader[Any]):
    def __iter__(self) -> Any:
        batches = super().__iter__()
        return (next(batches) for _ in range(len(self)))


class AsksTheData(DataLoader[Any]):
    def __iter__(self) -> Any:
        return (batch + 0 * self.dataset.length for batch in super().__iter__())  # type: ignore[attr-defined]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", [Doubles, LooksAhead, ByLength, AsksTheData])
def test_an_iter_of_the_users_is_used_and_continues(
    kind: type[DataLoader[Any]], workers: int
) -> None:
    def make() -> ResumableLoader:
        return resumable(kind(Numbers(), 3, shuffle=True, num_workers=workers))

    factor = 2 if kind is Doubles else 1
    expected = epoch_of(resumable(DataLoader(Numbers(), 3, shuffle=True)))
    one = make()
    whole = [epoch_of(one), epoch_of(one)]
    assert whole[0] == [[index * factor for index in batch] for batch in expected]
    stopped, continued = make(), make()
    before = take(stopped, 2)
    assert stopped.state_dict()["position"] == 6
    continued.load_state_dict(stopped.state_dict())
    assert [before + epoch_of(continued), epoch_of(continued)] == whole


def test_an_iter_that_drops_batches_or_reads_others_is_an_error() -> None:
    class Drops(DataLoader[Any]):
        def __iter__(self) -> Any:
            return (batch for batch in super().__iter__() if 0 not in batch)

    class Others(DataLoader[Any]):
        """Made over the loader's own order, before there was ours."""

        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self.made = super().__iter__()

        def __iter__(self) -> Any:
            return (next(self.made) for _ in range(len(self)))

    class Twice(DataLoader[Any]):
        def __iter__(self) -> Any:
            for batches in (super().__iter__(), super().__iter__()):
                yield from itertools.islice(batches, 2)

    with pytest.raises(RuntimeError, match="the loader ended 1 batches early"):
        epoch_of(resumable(Drops(Numbers(), 4)))
    with pytest.raises(RuntimeError, match=r"Others.__iter__ gave a batch that is not of this"):
        epoch_of(resumable(Others(Numbers(), 4)))
    with pytest.raises(RuntimeError, match=r"was read twice in one epoch"):
        epoch_of(resumable(Twice(Numbers(), 4)))


def test_a_batch_sampler_of_torch_over_a_users_sampler_is_divided_by_samples() -> None:
    class Evens(SequentialSampler):
        def __iter__(self) -> Iterator[int]:
            return iter(range(0, 10, 2))

    loader = DataLoader(Numbers(), batch_sampler=BatchSampler(Evens(range(10)), 2, drop_last=True))
    assert epoch_of(resumable(loader)) == [[0, 2], [4, 6]]
    assert [epoch_of(resumable(loader, rank=rank, size=2)) for rank in (0, 1)] == [
        [[0, 2]],
        [[4, 6]],
    ]
