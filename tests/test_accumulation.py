from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from dream_trainer.accumulation import AccumulationWindow
from dream_trainer.data import ResumableLoader

# These tests draw, and seed, on their own.
pytestmark = pytest.mark.may_leave("rng")


@dataclass
class Batches:
    """A loader seen by a window: samples of each batch here, and over all ranks."""

    mine: list[int]
    all_ranks: list[int] | None = None
    at: int = -1
    num_samples: int | None = None
    num_samples_all_ranks: int | None = None
    is_last: bool | None = None
    ends: set[int] = field(default_factory=set)

    def next(self) -> None:
        self.at += 1
        self.num_samples = self.mine[self.at]
        self.num_samples_all_ranks = (self.all_ranks or self.mine)[self.at]
        self.is_last = self.at == len(self.mine) - 1

    def num_samples_ahead(self, num_batches: int) -> list[int]:
        return (self.all_ranks or self.mine)[self.at + 1 : self.at + 1 + num_batches]


@dataclass
class Uncounted:
    """A loader that knows neither samples nor, without looking ahead, its end."""

    is_last: bool | None = None
    num_samples: int | None = None
    num_samples_all_ranks: int | None = None

    def num_samples_ahead(self, num_batches: int) -> None:
        return None


def window(size: int, dp_size: int = 1, sum_over_ranks=lambda total: total) -> AccumulationWindow:
    return AccumulationWindow(size, dp_size, sum_over_ranks)


def scaled(one: AccumulationWindow, loss: Tensor, weight: Any) -> Tensor:
    """The loss whose gradient is that of the batch."""
    loss, factor = one.weighted(loss, weight)
    return loss * factor


def factors(one: AccumulationWindow, batches: Batches) -> list[float]:
    """What each batch's mean loss is multiplied by, over an epoch."""
    found = []
    for _ in batches.mine:
        batches.next()
        one.start_batch(batches)
        found.append(scaled(one, torch.ones(()), None).item())
        one.finish_batch()
    return found


def step_ends(one: AccumulationWindow, batches: Batches) -> list[bool]:
    ends = []
    for _ in batches.mine:
        batches.next()
        one.start_batch(batches)
        ends.append(one.finish_batch())
    return ends


@pytest.mark.parametrize(
    ("size", "num_batches", "ends"),
    [(1, 3, [1, 1, 1]), (2, 4, [0, 1, 0, 1]), (2, 5, [0, 1, 0, 1, 1]), (8, 3, [0, 0, 1])],
)
def test_a_window_never_crosses_the_end_of_an_epoch(
    size: int, num_batches: int, ends: list[int]
) -> None:
    one = window(size)
    for _ in range(2):
        assert step_ends(one, Batches([4] * num_batches)) == [bool(end) for end in ends]


def test_a_short_last_window_is_scaled_by_its_own_size() -> None:
    assert factors(window(4), Batches([8] * 6)) == [0.25] * 4 + [0.5] * 2


def test_an_uneven_last_batch_counts_by_its_samples() -> None:
    assert factors(window(2), Batches([6, 6, 6, 2])) == [0.5, 0.5, 0.75, 0.25]


def test_uneven_ranks_make_up_for_the_mean_that_the_strategy_takes() -> None:
    # 6 + 2 samples over two ranks: each loss is a mean, and gradients are averaged over ranks.
    first = factors(window(1, dp_size=2), Batches([6], all_ranks=[8]))
    second = factors(window(1, dp_size=2), Batches([2], all_ranks=[8]))
    assert (first, second) == ([1.5], [0.5])
    assert factors(window(1, dp_size=2), Batches([0], all_ranks=[1])) == [0.0]


def test_an_ordinary_batch_is_not_multiplied_at_all() -> None:
    one, batches = window(1), Batches([4])
    batches.next()
    one.start_batch(batches)
    loss = torch.ones(())
    found, factor = one.weighted(loss, None)
    assert found is loss
    assert factor == 1.0


@pytest.mark.parametrize(("size", "batch_size"), [(1, 24), (2, 8), (4, 8), (3, 5), (2, 16)])
@pytest.mark.parametrize("is_weighted", [False, True])
def test_a_steps_gradient_is_that_of_one_large_batch(
    size: int, batch_size: int, is_weighted: bool
) -> None:
    torch.manual_seed(0)
    data = torch.randn(24, 3, dtype=torch.float64)
    loader = ResumableLoader(DataLoader(TensorDataset(data), batch_size=batch_size))
    one, parameter = window(size), torch.zeros(3, dtype=torch.float64, requires_grad=True)
    gradients, sizes, count = [], [], 0
    for (batch,) in loader:
        one.start_batch(loader)
        loss = (batch @ (parameter + 1)).square().mean()
        scaled(one, loss, len(batch) if is_weighted else None).backward()
        count += len(batch)
        if not one.is_accumulating:
            factor = one.gradient_factor(torch.device("cpu"))
            gradients.append(parameter.grad * (1 if factor is None else factor))
            sizes.append(count)
            parameter.grad, count = None, 0
        one.finish_batch()
    assert sum(sizes) == 24
    for end, size_, gradient in zip(accumulate(sizes), sizes, gradients, strict=True):
        (data[end - size_ : end] @ (parameter + 1)).square().mean().backward()
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-6, atol=0)
        parameter.grad = None


def test_without_counts_every_batch_counts_the_same() -> None:
    one, found = window(4), []
    for _ in range(4):
        one.start_batch(Uncounted())
        found.append(scaled(one, torch.ones(()), None).item())
        one.finish_batch()
    assert found == [0.25] * 4


def test_data_that_ends_unannounced_is_made_up_for_at_the_step() -> None:
    one, found = window(4), []
    for is_last in (False, True):
        one.start_batch(Uncounted(is_last))
        found.append(scaled(one, torch.ones(()), None).item())
        if not one.is_accumulating:
            assert sum(found) * one.gradient_factor(torch.device("cpu")) == 1.0
        assert one.finish_batch() is is_last


def weighted_run(plan: list[list[tuple[str, float | str]]]) -> list[float]:
    """Factors of the steps of one window, each batch given as backward and step calls."""
    one, found = window(len(plan)), []
    batches = Batches([4] * len(plan))
    for calls in plan:
        batches.next()
        one.start_batch(batches)
        for call, value in calls:
            if call == "backward":
                scaled(one, torch.ones(()), value)
            elif not one.is_accumulating:
                found.append(float(one.gradient_factor(torch.device("cpu"))))
        one.finish_batch()
    return found


def test_a_step_is_divided_by_the_weights_of_its_whole_window() -> None:
    plan = [[("backward", w), ("step", "")] for w in (3.0, 4.0, 1.0)]
    assert weighted_run(plan) == [1 / 8]


def test_two_optimizers_are_divided_by_their_own_losses_weights() -> None:
    one_after_the_other = [
        [("backward", d), ("step", "D"), ("backward", g), ("step", "G")]
        for d, g in ((1.0, 2.0), (3.0, 6.0))
    ]
    assert weighted_run(one_after_the_other) == [1 / 4, 1 / 8]


def test_two_optimizers_may_step_after_one_loss() -> None:
    plan = [[("backward", w), ("step", "A"), ("step", "B")] for w in (3.0, 5.0)]
    assert weighted_run(plan) == [1 / 8, 1 / 8]


def test_two_optimizers_may_step_after_both_losses() -> None:
    plan = [[("backward", w), ("backward", w), ("step", "A"), ("step", "B")] for w in (3.0, 5.0)]
    assert weighted_run(plan) == [1 / 8, 1 / 8]


def test_weights_of_another_rank_count_and_gradients_are_a_mean_over_ranks() -> None:
    one = window(1, dp_size=2, sum_over_ranks=lambda total: total + 6.0)
    batches = Batches([4], all_ranks=[8])
    batches.next()
    one.start_batch(batches)
    assert scaled(one, torch.ones(()), 2.0).item() == 2.0
    assert float(one.gradient_factor(torch.device("cpu"))) == 2 / 8


def test_a_filler_weighs_nothing() -> None:
    one, batches = window(1, dp_size=2, sum_over_ranks=lambda total: total + 8.0), Batches([0], [1])
    batches.next()
    one.start_batch(batches)
    assert scaled(one, torch.ones(()), 5.0).item() == 0.0
    assert float(one.gradient_factor(torch.device("cpu"))) == 1 / 4


def test_a_tensor_given_as_weight_stays_as_it_is() -> None:
    weight = torch.tensor(3.0)
    plan = [[("backward", weight), ("step", "")] for _ in range(4)]
    assert weighted_run(plan) == [1 / 12]
    assert weight.item() == 3.0


@pytest.mark.parametrize("weights", [(1.0, None), (None, 1.0)])
def test_weights_for_some_losses_of_a_window_only_are_refused(
    weights: tuple[float | None, float | None],
) -> None:
    one, batches = window(2), Batches([4, 4])
    batches.next()
    one.start_batch(batches)
    scaled(one, torch.ones(()), weights[0])
    one.finish_batch()
    batches.next()
    one.start_batch(batches)
    with pytest.raises(ValueError, match="Pass a weight every time, or never"):
        scaled(one, torch.ones(()), weights[1])


def test_the_next_window_may_choose_anew() -> None:
    one, batches = window(1), Batches([4, 4])
    losses = []
    for weight in (3.0, None):
        batches.next()
        one.start_batch(batches)
        losses.append(float(scaled(one, torch.ones(()), weight)))
        assert one.finish_batch()
    assert losses == [3.0, 1.0]


def test_optimizers_that_step_side_by_side_are_one_step_of_the_run() -> None:
    one, batches = window(1), Batches([4, 4])
    batches.next()
    one.start_batch(batches)
    assert [one.count_step(name) for name in ("D", "G", "D", "G")] == [True, False, True, False]
    one.finish_batch()
    batches.next()
    one.start_batch(batches)
    assert one.count_step("G") is True


def test_the_sum_of_weights_leaves_no_graph_behind() -> None:
    seen: list[Tensor] = []

    def keep(total: Tensor) -> Tensor:
        seen.append(total)
        return total

    one, batches = window(1, sum_over_ranks=keep), Batches([4])
    batches.next()
    one.start_batch(batches)
    scaled(one, torch.ones(()), torch.tensor(2.0, requires_grad=True) * 2)
    one.gradient_factor(torch.device("cpu"))
    assert not seen[0].requires_grad
