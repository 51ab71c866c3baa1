"""Any interruptions, ranks and batch sizes: each sample once, in one order, in the same steps."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Sampler

from dream_trainer.accumulation import AccumulationWindow
from dream_trainer.data import ResumableLoader
from dream_trainer.data.sampling import Place, SamplingPlan

# Loaders are made without looking at the global streams, which hypothesis seeds.
pytestmark = pytest.mark.may_leave("rng")

many = settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
some = settings(many, max_examples=80)
few = settings(many, max_examples=6)


# ---------------------------------------------------------------------- optimizer steps


@dataclass
class Counts:
    """What an accumulation window asks of a loader, from a plan."""

    plan: SamplingPlan
    epoch: int
    position: int
    num_samples: int | None = None
    num_samples_all_ranks: int | None = None
    is_last: bool | None = None

    def num_samples_ahead(self, num_batches: int) -> list[int]:
        return self.plan.num_samples_ahead(self.epoch, self.position, num_batches)


@st.composite
def steps_of_one_size(draw: Any) -> tuple[int, list[tuple[int, int, int]]]:
    """A global batch size, and legs of a run: (ranks, batch size, optimizer steps)."""
    ranks_and_sizes = st.tuples(st.integers(1, 4), st.integers(1, 4))
    factor = draw(st.integers(1, 3))
    global_batch_size = 12 * factor
    fitting = ranks_and_sizes.filter(lambda pair: global_batch_size % (pair[0] * pair[1]) == 0)
    legs = draw(st.lists(st.tuples(fitting, st.integers(0, 3)), max_size=4))
    legs.append((draw(fitting), 1000))
    return global_batch_size, [(*pair, steps) for pair, steps in legs]


@many
@given(
    length=st.integers(1, 130),
    run=steps_of_one_size(),
    shuffle=st.booleans(),
    drop_last=st.booleans(),
    epoch=st.integers(0, 3),
)
@example(length=13, run=(12, [(1, 4, 1), (3, 4, 1000)]), shuffle=True, drop_last=True, epoch=0)
def test_with_a_global_batch_size_the_same_samples_form_the_same_steps(
    length: int,
    run: tuple[int, list[tuple[int, int, int]]],
    shuffle: bool,
    drop_last: bool,
    epoch: int,
) -> None:
    global_batch_size, legs = run
    steps: list[list[int]] = []
    position = 0
    for size, batch_size, num_steps in legs:
        options = {"batch_size": batch_size, "shuffle": shuffle, "drop_last": drop_last}
        plans = [
            SamplingPlan(
                DataLoader(range(length), **options),  # type: ignore[arg-type]
                Place(7, rank, size, samples_per_step=global_batch_size),
            )
            for rank in range(size)
        ]
        window = AccumulationWindow(global_batch_size // (size * batch_size), size, lambda x: x)
        left = plans[0].num_batches(epoch, position)
        per_rank = zip(*(plan.shares(epoch, position) for plan in plans), strict=True)
        step: list[int] = []
        for _ in range(num_steps):
            for shares in per_rank:
                left -= 1
                position += shares[0].num_samples_all_ranks
                window.start_batch(
                    Counts(
                        plans[0],
                        epoch,
                        position,
                        shares[0].num_samples,
                        shares[0].num_samples_all_ranks,
                        left == 0,
                    )
                )
                step += [unit for share in shares for unit in share.units[: share.num_samples]]
                if window.finish_batch():
                    steps.append(step)
                    step = []
                    break
        assert not step, "an epoch ended inside a window"
    order = list(SamplingPlan(DataLoader(range(length), shuffle=shuffle), Place(7)).order(epoch))  # type: ignore[arg-type]
    expected = [order[i : i + global_batch_size] for i in range(0, length, global_batch_size)]
    if drop_last and len(expected[-1]) < global_batch_size:
        expected.pop()
    assert steps == expected


# ---------------------------------------------------------------------- whole loaders


class Ragged(Sampler[list[int]]):
    """Batches of 1, 2, 3, ... samples, each sample once; remembers, and so shuffles on."""

    def __init__(self, length: int) -> None:
        self.indices = list(range(length))

    def __iter__(self) -> Iterator[list[int]]:
        import random

        random.shuffle(self.indices)
        rest = iter(self.indices)
        for size in itertools.count(1):
            batch = list(itertools.islice(rest, size))
            if not batch:
                return
            yield batch


def loaders(
    kind: str, length: int, size: int, batch_size: int, workers: int, drop_last: bool = False
) -> list[ResumableLoader]:
    """One loader for each rank."""
    made = []
    for rank in range(size):
        options: dict[str, Any] = {"batch_size": batch_size, "drop_last": drop_last}
        if kind == "shuffled":
            options["shuffle"] = True
        elif kind == "batch sampler":
            options = {"batch_sampler": Ragged(length)}
        loader = DataLoader(range(length), num_workers=workers, **options)  # type: ignore[arg-type]
        made.append(ResumableLoader(loader, seed=7).attach(rank=rank, size=size))
    return made


def read(ranks: Sequence[ResumableLoader], count: int) -> list[int]:
    """Samples that count of the next batches, over all ranks."""
    used: list[int] = []
    iterators = [iter(one) for one in ranks]
    for batches in itertools.islice(zip(*iterators, strict=True), count):
        for one, batch in zip(ranks, batches, strict=True):
            used += batch.tolist()[: one.num_samples]
    for iterator in iterators:
        iterator.close()  # type: ignore[attr-defined]
    return used


kinds = st.sampled_from(["in order", "shuffled", "batch sampler"])
#: Batches to take on so many ranks, with such a batch size and so many workers, per leg.
legs_of = st.lists(
    st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(0, 5)), min_size=1, max_size=5
)


def check(
    kind: str, length: int, legs: Sequence[tuple[int, int, int]], workers: Sequence[int]
) -> None:
    """Read two epochs through every interruption, and compare with one that has none."""
    whole = loaders(kind, length, 1, 4, 0)
    expected = [read(whole, 10_000) for _ in range(2)]
    assert [sorted(epoch) for epoch in expected] == [list(range(length))] * 2
    if kind != "in order" and length > 12:
        assert expected[0] != expected[1]
    seen: dict[int, list[int]] = {0: [], 1: [], 2: []}
    state: dict[str, Any] | None = None
    for leg, (size, batch_size, count) in enumerate([*legs, (2, 3, 10_000), (1, 5, 10_000)]):
        ranks = loaders(kind, length, size, batch_size, workers[leg % len(workers)])
        if state is not None:
            kept = copy.deepcopy(state)
            for one in ranks:
                one.load_state_dict(state)
            assert state == kept
        epoch = ranks[0].epoch
        seen[epoch] += read(ranks, count)
        states = [one.state_dict() for one in ranks]
        assert all(one == states[0] for one in states), "the ranks stand at different places"
        state = states[0]
        if state["epoch"] == 2:
            break
    assert seen[0] == expected[0]
    assert seen[1] == expected[1][: len(seen[1])]


@some
@given(kind=kinds, length=st.integers(1, 40), legs=legs_of)
def test_every_epoch_is_one_permutation_through_every_interruption_and_change(
    kind: str, length: int, legs: list[tuple[int, int, int]]
) -> None:
    check(kind, length, legs, workers=[0])


@few
@given(
    kind=kinds,
    length=st.integers(10, 40),
    legs=st.lists(
        st.tuples(st.integers(1, 2), st.integers(2, 6), st.integers(1, 3)), min_size=1, max_size=1
    ),
)
def test_and_through_changes_of_the_number_of_workers(
    kind: str, length: int, legs: list[tuple[int, int, int]]
) -> None:
    check(kind, length, legs, workers=[2, 0, 1])


@some
@given(length=st.integers(1, 40), size=st.integers(1, 4), batch_size=st.integers(1, 6))
def test_drop_last_drops_less_than_a_batch_of_all_ranks_and_nothing_twice(
    length: int, size: int, batch_size: int
) -> None:
    used = read(loaders("shuffled", length, size, batch_size, 0, drop_last=True), 10_000)
    order = read(loaders("shuffled", length, 1, 1, 0), 10_000)
    assert used == order[: length - length % (size * batch_size)]
