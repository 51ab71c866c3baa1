"""Map-style loaders: order, position and randomness, whatever happens in between."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from dream_trainer.data import ResumableLoader
from dream_trainer.errors import StateError

# These tests draw, and seed, on their own.
pytestmark = pytest.mark.may_leave("rng")

WORKERS = (0, 2)


class Numbers(Dataset[int]):
    """Its own index, and a note of each index that was asked for (in this process)."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.asked: list[int] = []

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        self.asked.append(index)
        return index


class Draws(Numbers):
    """An index and a draw of every kind."""

    def __getitem__(self, index: int) -> tuple[int, float, float, float, float]:
        first = random.random()
        return (
            index,
            first,
            float(np.random.rand()),
            float(torch.rand((), dtype=torch.float64)),
            random.gauss(0, 1),
        )


def loader_of(dataset: Dataset[Any], **options: Any) -> DataLoader[Any]:
    return DataLoader(dataset, **{"batch_size": 4, "shuffle": True} | options)


def resumable(loader: Any, *, rank: int = 0, size: int = 1, **options: Any) -> ResumableLoader:
    return ResumableLoader(loader, **{"seed": 3} | options).attach(rank=rank, size=size)


def plain(batch: Any) -> Any:
    if isinstance(batch, torch.Tensor):
        return batch.tolist()
    return tuple(map(plain, batch)) if isinstance(batch, (list, tuple)) else batch


def epoch_of(one: ResumableLoader) -> list[Any]:
    return [plain(batch) for batch in one]


def take(one: ResumableLoader, count: int) -> list[Any]:
    taken = []
    if count:
        for batch in one:
            taken.append(plain(batch))
            if len(taken) == count:
                break
    return taken


def flat(batches: Sequence[Sequence[int]]) -> list[int]:
    return [index for batch in batches for index in batch]


# ---------------------------------------------------------------------- order


def test_the_order_is_a_function_of_seed_and_epoch_alone() -> None:
    first = resumable(loader_of(Numbers(10)))
    epochs = [epoch_of(first) for _ in range(3)]
    torch.manual_seed(99)
    second = resumable(loader_of(Numbers(10), generator=torch.Generator().manual_seed(5)))
    second.set_epoch(2)
    assert epoch_of(second) == epochs[2]
    assert first.epoch == second.epoch == 3
    assert len({tuple(flat(epoch)) for epoch in epochs}) == 3
    assert epoch_of(resumable(loader_of(Numbers(10)), seed=4)) != epochs[0]


def test_seed_0_is_a_seed() -> None:
    zero = ResumableLoader(loader_of(Numbers(20)), seed=0).attach(seed=5)
    five = ResumableLoader(loader_of(Numbers(20))).attach(seed=5)
    assert epoch_of(zero) != epoch_of(five)


@pytest.mark.parametrize("seed_samples", [True, False])
def test_the_batches_are_the_same_with_any_number_of_workers(seed_samples: bool) -> None:
    data: type[Numbers] = Draws if seed_samples else Numbers
    epochs = [
        [
            epoch_of(one)
            for one in [
                resumable(
                    loader_of(data(10), num_workers=workers, drop_last=True),
                    seed_samples=seed_samples,
                )
            ]
            for _ in range(2)
        ]
        for workers in WORKERS
    ]
    assert epochs[0] == epochs[1]


def test_a_loader_that_does_not_shuffle_keeps_the_order_of_the_data() -> None:
    one = resumable(loader_of(Numbers(10), shuffle=False))
    assert epoch_of(one) == epoch_of(one) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


@pytest.mark.parametrize("workers", WORKERS)
def test_numbers_of_batches_and_samples_are_known(workers: int) -> None:
    one = resumable(loader_of(Numbers(10), num_workers=workers))
    assert (len(one), one.num_batches, one.batch_size) == (3, 3, 4)
    seen = [
        (one.num_samples, one.num_samples_all_ranks, one.is_last, one.num_samples_ahead(5))
        for _ in one
    ]
    assert seen == [(4, 4, False, [4, 2]), (4, 4, False, [2]), (2, 2, True, [])]


# ---------------------------------------------------------------------- position


@pytest.mark.parametrize(("workers", "persistent"), [(0, False), (2, False), (2, True)])
def test_it_continues_at_every_batch(workers: int, persistent: bool) -> None:
    def make() -> ResumableLoader:
        return resumable(loader_of(Draws(10), num_workers=workers, persistent_workers=persistent))

    one = make()
    whole = [epoch_of(one), epoch_of(one)]
    for count in range(4):
        stopped = make()
        before = take(stopped, count)
        state = copy.deepcopy(stopped.state_dict())
        continued = make()
        continued.load_state_dict(state)
        assert before + epoch_of(continued) == whole[0], count
        if count < 3:  # else the epoch's last batch was handed out: what is left of it is nothing
            assert epoch_of(continued) == whole[1], count


def test_the_state_after_the_last_batch_leads_to_the_next_epoch() -> None:
    one = resumable(loader_of(Numbers(8)))
    whole = [epoch_of(one), epoch_of(one)]
    stopped = resumable(loader_of(Numbers(8)))
    take(stopped, 2)
    continued = resumable(loader_of(Numbers(8)))
    continued.load_state_dict(stopped.state_dict())
    assert epoch_of(continued) == []
    assert epoch_of(continued) == whole[1]


@pytest.mark.parametrize(("workers", "persistent"), [(0, False), (2, False), (2, True)])
def test_it_continues_in_the_same_process_too(workers: int, persistent: bool) -> None:
    options = {"num_workers": workers, "persistent_workers": persistent}
    whole = epoch_of(resumable(loader_of(Draws(16))))
    one = resumable(loader_of(Draws(16), **options))
    assert take(one, 1) + take(one, 2) + epoch_of(one) == whole


@pytest.mark.parametrize("workers", WORKERS)
def test_prefetched_batches_do_not_count_as_handed_out(workers: int) -> None:
    one = resumable(loader_of(Numbers(40), num_workers=workers))
    take(one, 2)
    assert one.state_dict()["position"] == 8


def test_samples_that_were_used_are_not_read_again() -> None:
    stopped = resumable(loader_of(Numbers(20)))
    used = flat(take(stopped, 3))
    data = Numbers(20)
    continued = resumable(loader_of(data))
    continued.load_state_dict(stopped.state_dict())
    rest = flat(epoch_of(continued))
    assert data.asked == rest
    assert sorted(used + rest) == list(range(20))


def test_loading_leaves_the_state_as_it_is() -> None:
    one = resumable(loader_of(Numbers(20)))
    take(one, 3)
    state = one.state_dict()
    kept = copy.deepcopy(state)
    other = resumable(loader_of(Numbers(20)))
    other.load_state_dict(state)
    epoch_of(other)
    assert state == kept


def test_a_loader_without_a_seed_takes_over_that_of_the_state_and_so_its_order() -> None:
    stopped = ResumableLoader(loader_of(Draws(20)), seed=5)
    before = take(stopped, 2)
    continued = ResumableLoader(loader_of(Draws(20)))
    continued.load_state_dict(stopped.state_dict())
    assert before + epoch_of(continued) == epoch_of(ResumableLoader(loader_of(Draws(20)), seed=5))


def test_going_to_the_epoch_under_way_keeps_the_position_and_rewinding_does_not() -> None:
    one = resumable(loader_of(Numbers(12)))
    first = take(one, 1)
    one.set_epoch(0)
    assert one.state_dict()["position"] == 4
    one.rewind()
    assert take(one, 1) == first


# ---------------------------------------------------------------------- ranks


def all_ranks(length: int, size: int, batch_size: int, position: int = 0) -> list[list[list[int]]]:
    """Per batch, per rank: the samples that count."""
    per_rank = []
    for rank in range(size):
        one = resumable(loader_of(Numbers(length), batch_size=batch_size), rank=rank, size=size)
        state = one.state_dict() | {"position": position}
        one.load_state_dict(state)
        per_rank.append([plain(batch)[: one.num_samples] for batch in one])
    return [list(shares) for shares in zip(*per_rank, strict=True)]


@pytest.mark.parametrize(("size", "batch_size"), [(1, 4), (2, 2), (3, 4), (4, 1), (8, 8)])
def test_other_ranks_and_batch_sizes_continue_in_the_same_order(size: int, batch_size: int) -> None:
    order = flat(epoch_of(resumable(loader_of(Numbers(30)))))
    first = all_ranks(30, size=2, batch_size=4)[:1]
    rest = all_ranks(30, size=size, batch_size=batch_size, position=8)
    assert flat(flat(first)) + flat(flat(rest)) == order


def test_a_rank_without_a_sample_gets_a_filler_that_does_not_count() -> None:
    seen = {}
    for rank in range(3):
        one = resumable(loader_of(Numbers(2)), rank=rank, size=3)
        seen[rank] = [
            (plain(batch), one.num_samples, one.num_samples_all_ranks, one.is_last) for batch in one
        ]
    (order,) = [flat(epoch_of(resumable(loader_of(Numbers(2)))))]
    assert seen == {
        0: [([order[0]], 1, 2, True)],
        1: [([order[1]], 1, 2, True)],
        2: [([order[0]], 0, 2, True)],
    }


def test_drop_last_counts_samples_over_all_ranks() -> None:
    for rank in range(2):
        one = resumable(loader_of(Numbers(15), drop_last=True), rank=rank, size=2)
        assert [one.num_samples for _ in one] == [4]


@pytest.mark.parametrize("drop_last", [False, True])
def test_a_loader_of_nothing_gives_nothing_and_goes_on_to_the_next_epoch(drop_last: bool) -> None:
    one = resumable(loader_of(Numbers(0), shuffle=False, drop_last=drop_last))
    assert (len(one), epoch_of(one), one.epoch) == (0, [], 1)


def test_fewer_samples_than_a_batch_with_drop_last_are_nothing() -> None:
    one = resumable(loader_of(Numbers(3), drop_last=True))
    assert (len(one), epoch_of(one), one.epoch) == (0, [], 1)


# ---------------------------------------------------------------------- randomness


def test_draws_for_a_sample_depend_on_seed_epoch_and_index_only() -> None:
    def by_index(one: ResumableLoader) -> dict[int, tuple[float, ...]]:
        return {row[0]: row[1:] for batch in one for row in zip(*plain(batch), strict=True)}

    one = resumable(loader_of(Draws(12)))
    first, second = by_index(one), by_index(one)
    others = [
        loader_of(Draws(12), batch_size=5),
        loader_of(Draws(12), shuffle=False, num_workers=2),
        loader_of(Draws(12), sampler=range(11, -1, -1), shuffle=False),
    ]
    for other in others:
        assert by_index(resumable(other)) == first
    assert len({draws for epoch in (first, second) for draws in epoch.values()}) == 24
    assert by_index(resumable(loader_of(Draws(12)), seed=4)) != first


@pytest.mark.usefixtures("untouched_rng")
@pytest.mark.parametrize("workers", WORKERS)
def test_the_streams_of_the_run_are_untouched(workers: int) -> None:
    one = resumable(loader_of(Draws(10), num_workers=workers, collate_fn=noisy))
    take(one, 1)
    epoch_of(one)
    weighted = WeightedRandomSampler([1.0] * 10, 10)
    epoch_of(resumable(loader_of(Draws(10), shuffle=False, sampler=weighted)))
    epoch_of(resumable(loader_of(Draws(10), shuffle=False, sampler=SubsetRandomSampler([1, 2]))))


def noisy(rows: list[Any]) -> tuple[Any, float, float]:
    return [row[0] for row in rows], random.random(), float(torch.rand(()))


def test_draws_while_collating_are_fixed_too() -> None:
    def make(workers: int) -> ResumableLoader:
        return resumable(loader_of(Draws(12), num_workers=workers, collate_fn=noisy))

    whole = epoch_of(make(0))
    assert epoch_of(make(2)) == whole
    stopped = make(0)
    before = take(stopped, 1)
    continued = make(2)
    continued.load_state_dict(stopped.state_dict())
    assert before + epoch_of(continued) == whole
    assert len({draw for _, draw, _ in whole}) == 3


def test_switched_off_samples_draw_from_the_streams_of_the_run() -> None:
    random.seed(5)
    expected = [random.random() for _ in range(4)]
    random.seed(5)

    class One(Numbers):
        def __getitem__(self, index: int) -> float:
            return random.random()

    (batch,) = epoch_of(resumable(loader_of(One(4)), seed_samples=False))
    assert batch == expected


# ---------------------------------------------------------------------- samplers


class Backwards(Sampler[int]):
    """Backwards in even epochs; in odd ones not."""

    def __init__(self, length: int) -> None:
        self.length, self.epoch = length, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        forwards = range(self.length)
        return iter(forwards if self.epoch % 2 else forwards[::-1])


class Buckets(Sampler[list[int]]):
    """Batches of different sizes, in an order drawn anew each epoch."""

    def __iter__(self) -> Iterator[list[int]]:
        batches = [[0], [1, 2], [3, 4, 5], [6, 7, 8, 9], [10, 11]]
        random.shuffle(batches)
        return iter(batches)


SAMPLERS: dict[str, Callable[[], dict[str, Any]]] = {
    "own sampler": lambda: {"sampler": Backwards(12), "batch_size": 4},
    "weighted": lambda: {"sampler": WeightedRandomSampler([1.0, 9.0] * 6, 12), "batch_size": 4},
    "subset": lambda: {"sampler": SubsetRandomSampler(range(3, 11)), "batch_size": 4},
    "replacement": lambda: {
        "sampler": RandomSampler(range(12), replacement=True, num_samples=9),
        "batch_size": 4,
    },
    "generator": lambda: {
        "sampler": WeightedRandomSampler([1.0] * 12, 12, generator=torch.Generator()),
        "batch_size": 4,
    },
    "own batch sampler": lambda: {"batch_sampler": Buckets()},
    "torch's batch sampler": lambda: {
        "batch_sampler": BatchSampler(RandomSampler(range(12)), 5, drop_last=False)
    },
    "no batches": lambda: {"batch_size": None, "shuffle": True},
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_any_sampler_continues_at_every_batch_and_draws_each_epoch_anew(name: str) -> None:
    def make(workers: int = 0) -> ResumableLoader:
        return resumable(DataLoader(Numbers(12), num_workers=workers, **SAMPLERS[name]()))

    one = make()
    whole = [epoch_of(one), epoch_of(one)]
    assert len(make()) == len(whole[0])
    assert epoch_of(make(workers=2)) == whole[0]
    assert whole[0] != whole[1]
    for count in range(len(whole[0])):
        stopped = make()
        before = take(stopped, count)
        continued = make()
        continued.load_state_dict(stopped.state_dict())
        assert [before + epoch_of(continued), epoch_of(continued)] == whole, count


def test_a_batch_sampler_of_torch_is_read_like_the_loaders_own() -> None:
    given = DataLoader(
        Numbers(14), batch_sampler=BatchSampler(SequentialSampler(range(14)), 4, drop_last=True)
    )
    assert epoch_of(resumable(given)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert resumable(given).batch_size == 4
    per_rank = [epoch_of(resumable(given, rank=rank, size=2)) for rank in range(2)]
    assert per_rank == [[[0, 1, 2, 3]], [[4, 5, 6, 7]]]


def test_whole_batches_of_an_own_batch_sampler_are_dealt_to_the_ranks() -> None:
    single = epoch_of(resumable(DataLoader(Numbers(12), batch_sampler=Buckets())))
    rows = []
    for rank in range(2):
        one = resumable(DataLoader(Numbers(12), batch_sampler=Buckets()), rank=rank, size=2)
        rows.append([(plain(b), one.num_samples, one.num_samples_all_ranks) for b in one])
    assert [rows[i % 2][i // 2][0] for i in range(5)] == single
    totals = [sum(len(batch) for batch in single[i : i + 2]) for i in (0, 2, 4)]
    assert [row[2] for row in rows[0]] == [row[2] for row in rows[1]] == totals
    assert [row[1] for row in rows[1]] == [len(single[1]), len(single[3]), 0]


def test_an_own_sampler_is_told_the_epoch() -> None:
    one = resumable(DataLoader(Numbers(4), sampler=Backwards(4), batch_size=4))
    assert [epoch_of(one) for _ in range(2)] == [[[3, 2, 1, 0]], [[0, 1, 2, 3]]]


def test_a_distributed_sampler_of_the_users_is_not_divided_twice() -> None:
    used = []
    for rank in range(2):
        data = Numbers(10)
        sampler = DistributedSampler(data, num_replicas=2, rank=rank, shuffle=True)
        one = resumable(DataLoader(data, sampler=sampler, batch_size=2), rank=rank, size=2)
        used += [plain(batch)[: one.num_samples] for batch in one]
    assert sorted(flat(used)) == list(range(10))
    assert flat(used) != list(range(10))


# ---------------------------------------------------------------------- errors


class Stops(Numbers):
    def __getitem__(self, index: int) -> int:
        if index == 5:
            raise StopIteration
        return index


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("length", [6, 12])
def test_a_stop_iteration_of_the_users_is_an_error_and_not_the_end(
    workers: int, length: int
) -> None:
    one = resumable(loader_of(Stops(length), shuffle=False, num_workers=workers))
    with pytest.raises(RuntimeError, match="does __getitem__ or collate_fn raise StopIteration"):
        epoch_of(one)
    assert one.epoch == 0


@pytest.mark.parametrize("workers", WORKERS)
def test_an_error_of_the_users_arrives_as_it_was_raised(workers: int) -> None:
    class Breaks(Numbers):
        def __getitem__(self, index: int) -> int:
            raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        epoch_of(resumable(loader_of(Breaks(4), num_workers=workers)))


def test_a_state_of_other_data_or_another_seed_is_refused_with_every_reason() -> None:
    stopped = resumable(loader_of(Numbers(20)))
    take(stopped, 2)
    other = resumable(loader_of(Numbers(21)), seed=4)
    with pytest.raises(StateError) as caught:
        other.load_state_dict(stopped.state_dict())
    assert caught.value.problems == (
        "seed 3 in the state, 4 here",
        "20 samples in the state, 21 here",
    )
    assert str(caught.value).endswith(
        "Continue with the same data and seed, or allow it by name: "
        "checkpoint_parameters.allow_changed=['seed', 'dataset_length']."
    )
    assert other.state_dict()["position"] == 0


def test_a_state_of_another_kind_of_loader_is_refused() -> None:
    stopped = resumable([1, 2, 3])
    take(stopped, 1)
    with pytest.raises(StateError, match="the state counts batches, this loader samples"):
        resumable(loader_of(Numbers(3))).load_state_dict(stopped.state_dict())


def test_what_cannot_be_iterated_or_is_resumable_already_is_refused() -> None:
    with pytest.raises(TypeError, match="int is not iterable; pass a DataLoader"):
        ResumableLoader(3)
    with pytest.raises(TypeError, match="is a ResumableLoader already"):
        ResumableLoader(ResumableLoader([1]))
