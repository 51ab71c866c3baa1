"""For any length, ranks, batch sizes and interruptions: each sample once, in one order."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from dream_trainer.data.sampling import Place, SamplingPlan

exhaustive = settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
#: Batches to take with so many ranks and such a batch size, before the run is interrupted.
Legs = Sequence[tuple[int, int, int]]


def plan(
    length: int, batch_size: int, rank: int, size: int, *, shuffle: bool = True, **options
) -> SamplingPlan:
    loader = DataLoader(range(length), batch_size=batch_size, shuffle=shuffle, **options)
    return SamplingPlan(loader, Place(7, rank, size))


def batches(
    length: int, batch_size: int, size: int, epoch: int, position: int, **options
) -> list[list[tuple[Sequence[int], int, int]]]:
    """Per batch, per rank: (units, samples that count, samples over all ranks)."""
    per_rank = [
        [
            (list(share.units), share.num_samples, share.num_samples_all_ranks)
            for share in plan(length, batch_size, rank, size, **options).shares(epoch, position)
        ]
        for rank in range(size)
    ]
    assert len({len(one) for one in per_rank}) == 1, "the ranks have different numbers of batches"
    return [list(one) for one in zip(*per_rank, strict=True)]


lengths = st.integers(1, 60)
ranks = st.integers(1, 5)
batch_sizes = st.integers(1, 9)
legs = st.lists(st.tuples(ranks, batch_sizes, st.integers(0, 6)), max_size=4)


@exhaustive
@given(
    length=lengths,
    interruptions=legs,
    last=st.tuples(ranks, batch_sizes),
    shuffle=st.booleans(),
    drop_last=st.booleans(),
    epoch=st.integers(0, 3),
)
def test_an_epoch_uses_each_sample_once_in_one_order_through_every_change(
    length: int,
    interruptions: Legs,
    last: tuple[int, int],
    shuffle: bool,
    drop_last: bool,
    epoch: int,
) -> None:
    options = {"shuffle": shuffle, "drop_last": drop_last}
    order = list(plan(length, 1, 0, 1, shuffle=shuffle).order(epoch))
    assert sorted(order) == list(range(length))
    used: list[int] = []
    for size, batch_size, count in [*interruptions, (*last, length)]:
        for shares in batches(length, batch_size, size, epoch, len(used), **options)[:count]:
            total = sum(counted for _, counted, _ in shares)
            assert {all_ranks for *_, all_ranks in shares} == {total}
            assert all(len(units) <= batch_size for units, *_ in shares)
            assert all(len(units) == counted or counted == 0 for units, counted, _ in shares)
            assert all(units for units, *_ in shares), "a rank without a batch would hang the rest"
            used += [one for units, counted, _ in shares for one in units[:counted]]
    left = length - len(used)
    assert used == order[: len(used)]
    assert left < last[0] * last[1] if drop_last else left == 0


@exhaustive
@given(length=lengths, size=ranks, batch_size=batch_sizes, position=st.integers(0, 60))
def test_what_lies_ahead_is_what_then_comes(
    length: int, size: int, batch_size: int, position: int
) -> None:
    position = min(position, length)
    following = [shares[0][2] for shares in batches(length, batch_size, size, 0, position)]
    one = plan(length, batch_size, 0, size)
    assert one.num_batches(0, position) == len(following)
    for count in (0, 1, 3, 100):
        assert one.num_samples_ahead(0, position, count) == following[:count]


@exhaustive
@given(length=lengths, size=ranks, batch_size=batch_sizes)
def test_only_the_last_batch_is_uneven_and_by_one_sample_at_most(
    length: int, size: int, batch_size: int
) -> None:
    every = batches(length, batch_size, size, 0, 0)
    for shares in every[:-1]:
        assert [counted for _, counted, _ in shares] == [batch_size] * size
    counts = [counted for _, counted, _ in every[-1]]
    assert max(counts) - min(counts) <= 1


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    loader = DataLoader(range(50), shuffle=True)
    orders = {
        (seed, epoch): tuple(SamplingPlan(loader, Place(seed)).order(epoch))
        for seed in (0, 1)
        for epoch in (0, 1, 2)
    }
    assert len(set(orders.values())) == 6
    later_first = SamplingPlan(loader, Place(1, 3, 4))
    for epoch in (2, 0, 1):
        assert tuple(later_first.order(epoch)) == orders[1, epoch]


def test_an_epoch_of_a_very_long_data_set_starts_anywhere_at_once() -> None:
    one = plan(10_000_000, 10, 0, 1, shuffle=False)
    share = next(one.shares(0, 9_999_990))
    assert list(share.units) == list(range(9_999_990, 10_000_000))
    assert one.num_batches(0) == 1_000_000
