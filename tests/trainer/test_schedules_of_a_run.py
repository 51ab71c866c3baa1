"""Schedulers step after steps, epochs or validations, and go on exactly from any checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import TinyTrainer, differences, exact_state, tiny
from torch.optim.lr_scheduler import ExponentialLR, ReduceLROnPlateau, StepLR

from dream_trainer import Callback, EarlyStopping, Schedule, warm_up
from dream_trainer.errors import ConfigError
from dream_trainer.schedules import cosine
from dream_trainer.trainer import BaseTrainer
from dream_trainer.world.wrappers import unwrap

pytestmark = pytest.mark.may_leave("rng")

Make = Callable[[Any, Any], Any]
HALF = 0.5


def scheduled(make: Make) -> type[TinyTrainer]:
    class Scheduled(TinyTrainer):
        def configure_schedulers(self) -> Any:
            (optimizer,) = self.named_optimizers().values()
            return make(self, optimizer)

    return Scheduled


class Rates(Callback):
    """The rate of each step, as a share of the first."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def pre_optimizer_step(self, trainer: Any, optimizer: Any) -> None:
        self.found.append(optimizer.param_groups[0]["lr"] / 0.05)


def plateau(optimizer: Any, **options: Any) -> ReduceLROnPlateau:
    """Nothing is ever better by so much: reduces at each look after the first."""
    return ReduceLROnPlateau(
        optimizer, factor=HALF, patience=0, threshold=1e9, threshold_mode="abs", **options
    )


#: What configure_schedulers makes, options of the run -> shares of 6 steps in epochs of 2.
CASES: dict[str, tuple[Make, dict[str, Any], list[float]]] = {
    "bare": (lambda _, o: ExponentialLR(o, HALF), {}, [1, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32]),
    "every second step": (
        lambda _, o: Schedule(ExponentialLR(o, HALF), frequency=2),
        {},
        [1, 1, 1 / 2, 1 / 2, 1 / 4, 1 / 4],
    ),
    "epoch": (
        lambda _, o: Schedule(ExponentialLR(o, HALF), every="epoch"),
        {},
        [1, 1, 1 / 2, 1 / 2, 1 / 4, 1 / 4],
    ),
    "every second epoch": (
        lambda _, o: Schedule(ExponentialLR(o, HALF), every="epoch", frequency=2),
        {},
        [1, 1, 1, 1, 1 / 2, 1 / 2],
    ),
    "validation of steps": (
        lambda _, o: Schedule(ExponentialLR(o, HALF), every="validation"),
        {"val_every_n_steps": 3, "val_every_n_epochs": None},
        [1, 1, 1, 1 / 2, 1 / 2, 1 / 2],
    ),
    "every second validation": (
        lambda _, o: Schedule(ExponentialLR(o, HALF), every="validation", frequency=2),
        {"val_every_n_steps": 1},
        [1, 1, 1 / 2, 1 / 2, 1 / 4, 1 / 4],
    ),
    "plateau of validations": (
        lambda _, o: Schedule(plateau(o), every="validation", monitor="val/loss"),
        {},
        [1, 1, 1, 1, 1 / 2, 1 / 2],
    ),
    "plateau of the training": (
        lambda _, o: Schedule(plateau(o), every="epoch", monitor="train/loss"),
        {"has_validation": False},
        [1, 1, 1, 1, 1 / 2, 1 / 2],
    ),
    "warm-up and epochs": (
        lambda _, o: warm_up(Schedule(StepLR(o, 1, HALF), every="epoch"), 4),
        {},
        [1 / 4, 1 / 2, 3 / 8, 1 / 2, 1 / 4, 1 / 4],
    ),
    "warm-up and plateau": (
        lambda _, o: warm_up(Schedule(plateau(o), every="validation", monitor="val/loss"), 3),
        {"val_every_n_steps": 1},
        [1 / 3, 2 / 3, 1 / 2, 1 / 4, 1 / 8, 1 / 16],
    ),
    "warm-up and every second step": (
        lambda _, o: warm_up(Schedule(ExponentialLR(o, HALF), frequency=2), 4),
        {},
        [1 / 4, 1 / 2, 3 / 8, 1 / 2, 1 / 4, 1 / 4],
    ),
    "warm-up alone": (lambda _, o: warm_up(o, 4), {}, [1 / 4, 1 / 2, 3 / 4, 1, 1, 1]),
    "to the end of the run": (
        lambda trainer, o: cosine(o, trainer.num_training_steps),
        {},
        [1, 0.9330127, 0.75, 0.5, 0.25, 0.0669873],
    ),
}
OPTIONS: dict[str, Any] = {"n_epochs": 3, "num_samples": 8, "dropout": 0.2}


@pytest.mark.parametrize("case", CASES)
def test_the_rate_of_each_step(tmp_path: Path, case: str) -> None:
    make, options, expected = CASES[case]
    rates = Rates()
    callbacks = {"rates": rates}
    tiny(tmp_path, scheduled(make), enable=False, callbacks=callbacks, **OPTIONS | options).fit()
    assert rates.found == pytest.approx(expected)


@pytest.mark.parametrize("case", CASES)
def test_it_goes_on_from_every_boundary(tmp_path: Path, case: str) -> None:
    make, options, _ = CASES[case]

    class Saves(Callback):
        count = 0

        def on_boundary(self, trainer: Any) -> None:
            trainer.save_checkpoint(tmp_path / str(Saves.count))
            Saves.count += 1

    straight = tiny(
        tmp_path, scheduled(make), enable=False, callbacks={"s": Saves()}, **OPTIONS | options
    )
    straight.fit()
    assert Saves.count == 9
    for number in range(9):
        again = tiny(tmp_path, scheduled(make), enable=False, **OPTIONS | options)
        again.load_checkpoint(tmp_path / str(number))
        again.fit()
        assert differences(exact_state(straight), exact_state(again)) == [], number


def test_a_scheduler_has_its_place_whatever_says_when_it_steps(tmp_path: Path) -> None:
    make: Make = lambda _, o: Schedule(StepLR(o, 1), every="epoch")  # noqa: E731
    trainer = tiny(tmp_path, scheduled(make), enable=False)
    trainer.prepare()
    (scheduler,) = trainer.named_schedulers().values()
    assert isinstance(scheduler, StepLR)
    assert trainer.get_scheduler_from_optimizer(trainer.named_optimizers()["net"]) is scheduler
    assert trainer.state_dict()["schedulers"]["net"] == scheduler.state_dict()


def test_a_base_trainer_says_when_its_schedulers_step(tmp_path: Path) -> None:
    class Own(TinyTrainer):
        def configure_schedulers(self) -> Any:
            return None

        def setup(self) -> None:
            super().setup()
            (optimizer,) = self.named_optimizers().values()
            self.own = ExponentialLR(unwrap(optimizer), HALF)

        def named_schedulers(self) -> Any:
            return {"net": self.own}

        def named_schedules(self) -> Any:
            return {"net": Schedule(self.own, every="epoch")}

    class Bare(Own):
        named_schedules = BaseTrainer.named_schedules

    for kind, expected in ((Own, [1, 1, 0.5, 0.5]), (Bare, [1, 0.5, 0.25, 0.125])):
        rates = Rates()
        callbacks = {"rates": rates}
        tiny(tmp_path, kind, enable=False, n_epochs=2, num_samples=8, callbacks=callbacks).fit()
        assert rates.found == expected


def test_what_never_steps_or_misses_its_value_is_said(tmp_path: Path) -> None:
    late: Make = lambda _, o: Schedule(plateau(o), every="validation", monitor="val/loss")  # noqa: E731
    with pytest.raises(ConfigError, match="net steps after validations, and val_dataloader is"):
        tiny(tmp_path, scheduled(late), enable=False, has_validation=False).fit()
    other: Make = lambda _, o: Schedule(plateau(o), every="validation", monitor="val/f1")  # noqa: E731
    with pytest.raises(ConfigError, match=r"schedule of net: monitor='val/f1' .*\(val/loss\)"):
        tiny(tmp_path, scheduled(other), enable=False).fit()


def test_nobody_watches_what_nobody_asks_for(tmp_path: Path) -> None:
    trainer = tiny(tmp_path, callbacks={"stopping": EarlyStopping()}, enable=False)
    trainer.fit()
    assert not trainer.monitored.is_watching
    assert trainer.state_dict()["trainer"]["monitored"] == {}
