"""find_learning_rate: Smith's range test, on a trainer that is made for it and thrown away."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, TypeVar

from dream_trainer.aside import nothing_on_disk, require_trainer, steps_alone
from dream_trainer.callbacks import CallbackList
from dream_trainer.errors import ConfigError
from dream_trainer.randomness import all_preserved
from dream_trainer.trainer.base import BaseTrainer, BaseTrainerConfig
from dream_trainer.tuning.learning_rate_result import LearningRateResult
from dream_trainer.tuning.range_test import Mode, RangeTest, Sweep

Config = TypeVar("Config", bound=BaseTrainerConfig)
#: Names of callbacks: the test's own, and the one by which a LightningModule gets its hooks.
_NAME, _KEPT = "range_test", "lightning_module"
_FEWEST_STEPS = 10


def find_learning_rate(
    make_trainer: Callable[[Config], BaseTrainer],
    config: Config,
    *,
    min_lr: float = 1e-7,
    max_lr: float = 1.0,
    steps: int = 100,
    mode: Mode = "exponential",
    early_stop_threshold: float | None = 4.0,
    smoothing: float = 0.8,
    optimizer: str | None = None,
    loss: str = "loss",
) -> LearningRateResult:
    """Train a few steps with a learning rate that grows, and see at which the loss falls fastest.

    The range test of Leslie N. Smith, "Cyclical Learning Rates for Training Neural Networks"
    (arXiv 1506.01186, section 3.3). It trains on the batches that a fit would begin with, with
    accumulation, clipping and layout of the configuration, on all of its ranks.

    A second trainer is made for it and thrown away, from a copy of ``config`` without callbacks
    and loggers; nothing is written, schedulers stand still, there is no validation. So a fit
    before or after it is, to the bit, what it is without it, also if the test is interrupted.
    What ``make_trainer`` only hands on, a model that exists already for example, is trained: let
    it make one. Call this before a trainer of the same run has set up its models, or there are
    two in memory. Every rank calls it, and all get the same result.

    Args:
        make_trainer: the trainer's class, or any function from a configuration to a trainer.
        config: of the run.
        min_lr: rate of the first step, above 0.
        max_lr: rate of the last step.
        steps: optimizer steps, at least 10. An epoch that is shorter is followed by the next.
        mode: ``"exponential"`` multiplies the rate by the same factor after every step,
            ``"linear"`` adds the same number.
        early_stop_threshold: stop once the smoothed loss is above so many times its lowest value;
            None goes on to ``max_lr``. A loss that is not finite always ends the test.
        smoothing: weight of the past in the average of the loss, from 0 to below 1.
        optimizer: name of the one whose rate grows, while the others train with theirs; None
            for all.
        loss: name of the loss among what ``training_step`` returns or logs.

    Returns:
        Rates, losses and a suggestion. The rate is that of the first group of parameters that
        has one; other groups, and other optimizers, keep their ratio to it.

    Raises:
        ConfigError: an argument, or the configuration, cannot work.
        Exception: what training raises.
    """
    _require(config, min_lr, max_lr, steps, mode, early_stop_threshold, smoothing)
    sweep = Sweep(min_lr, max_lr, steps, mode, smoothing, early_stop_threshold, optimizer, loss)
    test = RangeTest(sweep)
    # A constructor may draw, too.
    with all_preserved(), _without_traces(make_trainer, config, test) as trainer:
        trainer.fit()
    assert test.configured is not None
    return LearningRateResult(
        lrs=tuple(test.lrs),
        losses=tuple(test.losses),
        configured=test.configured,
        is_diverged=test.is_diverged,
        mode=mode,
        smoothing=smoothing,
        optimizer=optimizer,
    )


def _without_traces(
    make_trainer: Callable[[Any], BaseTrainer], config: BaseTrainerConfig, test: RangeTest
) -> BaseTrainer:
    """A trainer whose fit is the test, and touches nothing that others have."""
    made = require_trainer(make_trainer(_for_test(config, test.sweep.steps)))
    # Also those that a constructor adds: they may write, or read what is not written here.
    kept = {name: made.callbacks[name] for name in made.callbacks if name == _KEPT}
    made.callbacks = CallbackList({**kept, _NAME: test})
    made.loggers = {}
    # A scheduler that is stepped may change momentum, or refuse more steps than it was made for.
    vars(made)["named_schedulers"] = vars(made)["named_schedules"] = _no_schedulers
    return made


def _for_test(config: BaseTrainerConfig, steps: int) -> BaseTrainerConfig:
    """A copy of a configuration, down to the objects in it, for so many steps without a trace."""
    bare = copy.copy(config)
    bare.callbacks, bare.loggers = {}, {}
    bare.training_parameters = steps_alone(
        config.training_parameters,
        steps,
        on_nonfinite="raise",  # steps that are left out have no end; the test ends at the first
    )
    bare.checkpoint_parameters = nothing_on_disk(config.checkpoint_parameters)
    problems, copied, known = [], copy.copy(bare), dict[int, Any]()
    for name, value in vars(bare).items():
        try:
            # One memory for all: fields that share an object share its copy.
            setattr(copied, name, copy.deepcopy(value, known))
        except Exception as error:  # noqa: BLE001 - whatever an object does when it is copied
            problems.append(f"{name} cannot be copied: {type(error).__name__}: {error}")
    if problems:
        raise ConfigError(
            "find_learning_rate",
            [*problems, "the test would train, or read on, what the run has"],
            "Let make_trainer make it, from a configuration without it.",
        )
    return copied


def _no_schedulers() -> dict[str, Any]:
    return {}


def _require(
    config: object,
    min_lr: float,
    max_lr: float,
    steps: int,
    mode: str,
    early_stop_threshold: float | None,
    smoothing: float,
) -> None:
    problems = []
    if not isinstance(config, BaseTrainerConfig):
        problems.append(f"{type(config).__name__} is no BaseTrainerConfig")
    if not 0 < min_lr < max_lr or not math.isfinite(max_lr):
        problems.append(f"min_lr={min_lr!r} and max_lr={max_lr!r}: not 0 < min_lr < max_lr")
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < _FEWEST_STEPS:
        problems.append(f"steps={steps!r} is not a whole number of {_FEWEST_STEPS} or more")
    if mode not in ("exponential", "linear"):
        problems.append(f"mode={mode!r} is neither 'exponential' nor 'linear'")
    if early_stop_threshold is not None and not early_stop_threshold > 1:
        problems.append(f"early_stop_threshold={early_stop_threshold!r} is not above 1")
    if not 0 <= smoothing < 1:
        problems.append(f"smoothing={smoothing!r} is not from 0 to below 1")
    if problems:
        raise ConfigError("find_learning_rate", problems)
