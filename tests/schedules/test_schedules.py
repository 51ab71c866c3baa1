"""Shapes of learning rates, warm-up on top of any schedule, schedulers of groups that are added."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CosineAnnealingLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from dream_trainer.errors import ConfigError
from dream_trainer.schedules import (
    Schedule,
    cosine,
    follow_new_groups,
    inverse_square_root,
    linear,
    load_scheduler_state,
    warm_up,
    warm_up_stable_decay,
)


def optimizer(lr: float | torch.Tensor = 1.0) -> SGD:
    return SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)


def rates(scheduler: Any, steps: int) -> list[float]:
    """The rate that each of the next steps uses."""
    found = []
    for _ in range(steps):
        found.append(float(scheduler.optimizer.param_groups[0]["lr"]))
        scheduler.optimizer.step()
        scheduler.step()
    return found


def test_shapes_begin_and_end_where_they_say() -> None:
    assert rates(linear(optimizer(2.0), 5), 6) == pytest.approx([2.0, 1.6, 1.2, 0.8, 0.4, 0.0])
    assert rates(linear(optimizer(), 6, warm_up=4, end=0.5), 7) == pytest.approx(
        [0.25, 0.5, 0.75, 1.0, 1 - 0.5 / 3, 1 - 1 / 3, 0.5]
    )
    assert rates(cosine(optimizer(), 4), 5) == pytest.approx([1, 0.8535534, 0.5, 0.1464466, 0])
    assert rates(warm_up_stable_decay(optimizer(), 8, warm_up=2, decay=4), 10) == pytest.approx(
        [0.5, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0, 0]
    )
    assert rates(inverse_square_root(optimizer(), warm_up=4), 16)[::5] == pytest.approx(
        [0.25, (4 / 6) ** 0.5, (4 / 11) ** 0.5, 0.5]
    )


def test_cosine_without_warm_up_is_torchs() -> None:
    assert rates(cosine(optimizer(0.3), 9), 9) == pytest.approx(
        rates(CosineAnnealingLR(optimizer(0.3), 9), 9)
    )


def test_a_shape_that_goes_on_with_more_steps_is_the_longer_one() -> None:
    short, long = linear(optimizer(), 4), linear(optimizer(), 8)
    rates(short, 2)
    state = copy.deepcopy((short.optimizer.state_dict(), short.state_dict()))
    long.optimizer.load_state_dict(state[0])
    long.load_state_dict(state[1])
    rates(long, 1)
    assert rates(long, 2) == pytest.approx([5 / 8, 4 / 8])


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda: cosine(optimizer(), 0), "steps=0"),
        (lambda: linear(optimizer(), 5, warm_up=-1), "not whole numbers"),
        (lambda: cosine(optimizer(), 5, end=2.0), "end=2.0"),
        (lambda: inverse_square_root(optimizer(), warm_up=0), "warm_up=0"),
        (lambda: warm_up(optimizer(), 0), "steps=0"),
        (lambda: Schedule(ReduceLROnPlateau(optimizer())), "looks for a plateau"),
        (lambda: Schedule(StepLR(optimizer(), 1), monitor="val/loss", every="epoch"), "no value"),
        (lambda: Schedule(StepLR(optimizer(), 1), every="year"), "every='year'"),  # type: ignore[arg-type]
        (lambda: Schedule(StepLR(optimizer(), 1), frequency=0), "frequency=0"),
        (lambda: Schedule(optimizer()), "SGD is no scheduler"),  # type: ignore[arg-type]
        (
            lambda: Schedule(ReduceLROnPlateau(optimizer()), monitor="val/loss"),
            "not known after each step",
        ),
    ],
)
def test_what_cannot_work_is_refused_by_name(make: Callable[[], Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        make()


def test_a_run_shorter_than_its_warm_up_is_told_and_follows_it_as_far_as_it_goes() -> None:
    for make in (cosine, linear):
        with pytest.warns(UserWarning, match="ends at step 3, before 4 steps of warm-up are over"):
            short = make(optimizer(), 3, warm_up=4)
        long = rates(make(optimizer(), 9, warm_up=4), 3)
        assert rates(short, 3) == long
    with pytest.warns(UserWarning, match="before 3 steps of warm-up and 3 steps of decay are over"):
        both = warm_up_stable_decay(optimizer(), 5, warm_up=3, decay=3)
    assert rates(both, 5) == pytest.approx([1 / 3, 2 / 3, 1.0, 2 / 3, 1 / 3])


# ---------------------------------------------------------------------- warm-up


def test_warm_up_multiplies_what_the_schedule_has_without_it() -> None:
    plain = rates(ExponentialLR(optimizer(), 0.9), 8)
    warm = rates(warm_up(ExponentialLR(optimizer(), 0.9), 4), 8)
    factors = [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]
    assert warm == [rate * factor for rate, factor in zip(plain, factors, strict=True)]


def test_warm_up_of_an_optimizer_ends_at_its_rate_and_of_a_tensor_in_place() -> None:
    made = optimizer(torch.tensor(0.8))
    held = made.param_groups[0]["lr"]
    assert rates(warm_up(made, 4), 6) == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8])
    assert made.param_groups[0]["lr"] is held


def test_a_plateau_under_a_warm_up_reduces_the_whole_rate() -> None:
    plateau = ReduceLROnPlateau(optimizer(), factor=0.5, patience=0)
    schedule = warm_up(Schedule(plateau, every="validation", monitor="val/loss"), 4)
    assert (schedule.every, schedule.innermost) == ("validation", plateau)
    warm: Any = schedule.scheduler
    group, found = plateau.optimizer.param_groups[0], []
    for value in (1.0, 2.0, 0.5, 0.6):
        found.append(group["lr"])
        warm.warm()
        warm.step_schedule(value)
        found.append(group["lr"])
    assert found == [0.25, 0.5, 0.5, 0.375, 0.375, 0.5, 0.5, 0.25]


@pytest.mark.parametrize("at", range(7))
def test_warm_up_goes_on_from_its_state(at: int) -> None:
    whole = rates(warm_up(StepLR(optimizer(0.3), 2, 0.7), 4), 7)
    first = warm_up(StepLR(optimizer(0.3), 2, 0.7), 4)
    head = rates(first, at)
    state = copy.deepcopy((first.optimizer.state_dict(), first.state_dict()))
    second = warm_up(StepLR(optimizer(0.3), 2, 0.7), 4)
    second.optimizer.load_state_dict(state[0])
    second.load_state_dict(state[1])
    assert head + rates(second, 7 - at) == whole


# ---------------------------------------------------------------------- groups that are added

KINDS: dict[str, Callable[[Any], Any]] = {
    "StepLR": lambda o: StepLR(o, 2, 0.5),
    "LambdaLR": lambda o: LambdaLR(o, lambda step: 1 / (1 + step)),
    "shape": lambda o: cosine(o, 9, warm_up=3),
    "CosineAnnealingLR": lambda o: CosineAnnealingLR(o, 9),
    "OneCycleLR": lambda o: OneCycleLR(o, 1.0, 20),
    "SequentialLR": lambda o: SequentialLR(o, [LinearLR(o), cosine(o, 9)], [4]),
    "ChainedScheduler": lambda o: ChainedScheduler([LinearLR(o), ExponentialLR(o, 0.9)]),
    "warm-up": lambda o: warm_up(ExponentialLR(o, 0.9), 6),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_group_has_its_share_of_the_rate_at_every_step(kind: str) -> None:
    scheduler = KINDS[kind](optimizer())
    rates(scheduler, 2)
    add_group(scheduler, 0.1)
    groups = scheduler.optimizer.param_groups
    for _ in range(6):
        rates(scheduler, 1)
        assert groups[1]["lr"] == pytest.approx(0.1 * groups[0]["lr"], rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_from_after_a_group_was_added_loads_into_a_scheduler_from_before(kind: str) -> None:
    scheduler, again = KINDS[kind](optimizer()), KINDS[kind](optimizer())
    rates(scheduler, 2)
    add_group(scheduler, 0.1)
    rates(scheduler, 1)
    state = copy.deepcopy((scheduler.optimizer.state_dict(), scheduler.state_dict()))
    again.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))]})
    again.optimizer.load_state_dict(state[0])
    load_scheduler_state(again, state[1])
    for one in (scheduler, again):
        rates(one, 5)
    both = [[g["lr"] for g in one.optimizer.param_groups] for one in (scheduler, again)]
    assert both[0] == both[1]


def add_group(scheduler: Any, share: float) -> None:
    first = scheduler.optimizer.param_groups[0]
    scaled = {k: first[k] * share for k in ("lr", "initial_lr", "max_lr", "min_lr") if k in first}
    group = {**first, **scaled, "params": [torch.nn.Parameter(torch.zeros(1))]}
    scheduler.optimizer.add_param_group(group)
    follow_new_groups(scheduler, 1, [(0, share)])
