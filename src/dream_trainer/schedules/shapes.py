"""Shapes of learning rates that go by a name, as factors of the optimizer's own rate.

Each is torch's ``LambdaLR``. What a shape is made of (its length, its warm-up) is no part of its
state: a run that goes on with more steps follows the longer shape from there.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from dream_trainer.errors import ConfigError


def cosine(optimizer: Optimizer, steps: int, *, warm_up: int = 0, end: float = 0.0) -> LambdaLR:
    """Linear warm-up, then half a cosine (Loshchilov and Hutter, SGDR, 2017).

    Args:
        optimizer: whose rate is the highest one.
        steps: optimizer steps in all, ``trainer.num_training_steps`` for example.
        warm_up: of them, the last of which has the highest rate.
        end: the rate that it comes down to, as a share of the highest.
    """
    _check("cosine", steps, warm_up, end=end)
    return LambdaLR(optimizer, partial(_falling, _half_cosine, steps, warm_up, end))


def linear(optimizer: Optimizer, steps: int, *, warm_up: int = 0, end: float = 0.0) -> LambdaLR:
    """Linear warm-up, then a straight line down (Devlin et al., BERT, 2019).

    Args:
        optimizer: whose rate is the highest one.
        steps: optimizer steps in all, ``trainer.num_training_steps`` for example.
        warm_up: of them, the last of which has the highest rate.
        end: the rate that it comes down to, as a share of the highest.
    """
    _check("linear", steps, warm_up, end=end)
    return LambdaLR(optimizer, partial(_falling, _line, steps, warm_up, end))


def warm_up_stable_decay(
    optimizer: Optimizer, steps: int, *, warm_up: int, decay: int, end: float = 0.0
) -> LambdaLR:
    """Linear warm-up, a constant rate, and a straight line down (Hu et al., MiniCPM, 2024).

    Args:
        optimizer: whose rate is the highest one.
        steps: optimizer steps in all, ``trainer.num_training_steps`` for example.
        warm_up: of them at the beginning, the last of which has the highest rate.
        decay: of them at the end, down to the last rate.
        end: the rate that it comes down to, as a share of the highest.
    """
    _check("warm_up_stable_decay", steps, warm_up, decay, end=end)
    return LambdaLR(optimizer, partial(_stable_then_falling, steps, warm_up, decay, end))


def inverse_square_root(optimizer: Optimizer, *, warm_up: int) -> LambdaLR:
    """Linear warm-up, then 1 / sqrt(step) without an end (Vaswani et al., 2017).

    Args:
        optimizer: whose rate is the highest one.
        warm_up: optimizer steps, the last of which has the highest rate.
    """
    if type(warm_up) is not int or warm_up < 1:
        raise ConfigError(
            "inverse_square_root", [f"warm_up={warm_up!r} is not a whole number above 0"]
        )
    return LambdaLR(optimizer, partial(_inverse_square_root, warm_up))


def _falling(
    shape: Callable[[float], float], steps: int, warm_up: int, end: float, step: int
) -> float:
    """The factor of the step with that index; ``end`` is for the one after the last."""
    if step < warm_up:
        return (step + 1) / warm_up
    peak = max(0, warm_up - 1)
    passed = min(1.0, (step - peak) / max(1, steps - peak))
    return end + (1.0 - end) * shape(passed)


def _half_cosine(passed: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * passed))


def _line(passed: float) -> float:
    return 1.0 - passed


def _stable_then_falling(steps: int, warm_up: int, decay: int, end: float, step: int) -> float:
    if step < warm_up:
        return (step + 1) / warm_up
    passed = min(1.0, max(0, step - (steps - decay)) / max(1, decay))
    return end + (1.0 - end) * _line(passed)


def _inverse_square_root(warm_up: int, step: int) -> float:
    return min((step + 1) / warm_up, math.sqrt(warm_up / (step + 1)))


def _check(place: str, steps: int, *parts: int, end: float) -> None:
    problems = []
    if type(steps) is not int or steps < 1:
        problems.append(f"steps={steps!r} is not a whole number above 0")
    elif any(type(part) is not int or part < 0 for part in parts):
        problems.append(f"{parts} of the steps: not whole numbers from 0")
    elif sum(parts) > steps:
        # Trial runs of a few steps (debug, profile, verify-resume) have the schedule of long ones.
        text = f"{place}: the run ends at step {steps}, before {_named(parts)} are over"
        warnings.warn(text, stacklevel=3)
    if not 0.0 <= end <= 1.0:
        problems.append(f"end={end!r} is a share of the highest rate, from 0 to 1")
    if problems:
        raise ConfigError(place, problems)


def _named(parts: tuple[int, ...]) -> str:
    names = ("steps of warm-up", "steps of decay")
    return " and ".join(f"{n} {name}" for n, name in zip(parts, names, strict=False) if n)
