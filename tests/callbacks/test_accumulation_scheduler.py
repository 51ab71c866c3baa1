"""Batches per step change at the beginning of an epoch, and everything that counts steps knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support import TinyTrainer, differences, exact_state, tiny, tiny_config

from dream_trainer import Callback, GradientAccumulationScheduler, plan_run
from dream_trainer.data import ResumableLoader
from dream_trainer.errors import ConfigError
from dream_trainer.trainer.presets import debug

pytestmark = pytest.mark.may_leave("rng")


class StepsAtEpochEnds(Callback):
    def __init__(self) -> None:
        self.steps: list[int] = []

    def post_epoch(self, trainer: Any) -> None:
        self.steps.append(trainer.global_step)


def run(root: Path, scheduling: dict[int, int], kind: Any = TinyTrainer, **options: Any) -> Any:
    ends = StepsAtEpochEnds()
    callbacks = {"scheduler": GradientAccumulationScheduler(scheduling), "ends": ends}
    defaults = {"n_epochs": 6, "num_samples": 28, "dropout": 0.2}
    trainer = tiny(root, kind, callbacks=callbacks, **defaults | options)
    trainer.fit()
    return trainer, ends.steps


class Batches(TinyTrainer):
    """A loader that cannot tell its length."""

    def configure_dataloaders(self) -> Any:
        train, _ = super().configure_dataloaders()

        class Stream:
            def __iter__(self) -> Any:
                return iter(train)

        return ResumableLoader(Stream()), None


#: Scheduling, options -> optimizer steps at the end of each epoch of seven batches.
CASES: dict[str, tuple[dict[int, int], dict[str, Any], list[int]]] = {
    "fewer and fewer": ({0: 4, 2: 2, 4: 1}, {}, [2, 4, 8, 12, 19, 26]),
    "first from the configuration": (
        {3: 1},
        {"gradient_accumulation_steps": 7},
        [1, 2, 3, 10, 17, 24],
    ),
    "key behind the end": ({0: 2, 99: 1}, {"n_epochs": 2}, [4, 8]),
    "a number of steps": ({0: 3, 1: 1}, {"train_steps_per_epoch": 2, "n_epochs": 3}, [2, 4, 6]),
    "a share": ({0: 2, 1: 1}, {"train_steps_per_epoch": 0.5, "n_epochs": 3}, [2, 6, 10]),
}


@pytest.mark.parametrize("case", CASES)
def test_epochs_have_the_steps_that_are_counted_before(tmp_path: Path, case: str) -> None:
    scheduling, options, expected = CASES[case]
    trainer, ends = run(tmp_path, scheduling, enable=False, **options)
    assert ends == expected
    assert trainer.num_training_steps == expected[-1]
    config = tiny_config(
        tmp_path,
        callbacks={"scheduler": GradientAccumulationScheduler(scheduling)},
        **{"n_epochs": 6, "num_samples": 28} | options,
    )
    plan = plan_run(TinyTrainer, config, 1)
    assert (plan.steps.total, plan.steps.per_epoch) == (expected[-1], expected[0])


def test_a_loader_without_length_looks_ahead_for_the_last_batch(tmp_path: Path) -> None:
    _, ends = run(tmp_path, {0: 1, 1: 4}, Batches, n_epochs=3, enable=False)
    assert ends == [7, 9, 11]


@pytest.mark.parametrize("kind", [TinyTrainer, Batches])
@pytest.mark.filterwarnings("ignore:.*has no state_dict:UserWarning")
def test_saved_after_any_batch_it_goes_on_exactly(tmp_path: Path, kind: Any) -> None:
    class Saves(Callback):
        """Also in the middle of windows."""

        def post_train_step(self, trainer: Any, *arguments: Any) -> None:
            if trainer.progress.num_batches < 17:
                trainer.save_checkpoint(tmp_path / f"at-{trainer.progress.num_batches}")

    def made(**callbacks: Any) -> Any:
        scheduler = GradientAccumulationScheduler({0: 3, 1: 2, 2: 1})
        return tiny(
            tmp_path,
            kind,
            n_epochs=3,
            num_samples=28,
            dropout=0.2,
            enable=False,
            callbacks={"scheduler": scheduler, **callbacks},
        )

    straight = made(saves=Saves())
    straight.fit()
    for number in range(1, 17):
        again = made()
        again.load_checkpoint(tmp_path / f"at-{number}")
        again.fit()
        assert differences(exact_state(straight), exact_state(again)) == [], number


@pytest.mark.parametrize(
    ("scheduling", "options", "problem"),
    [
        ({}, {}, "empty"),
        ({-1: 2}, {}, "epoch -1"),
        ({0: 0}, {}, "0 batches"),
        ({0: 2}, {"global_batch_size": 8}, "global_batch_size=8"),
        ({0: 2}, {"gradient_accumulation_steps": 4}, "gradient_accumulation_steps=4"),
    ],
)
def test_what_cannot_be_is_refused(
    tmp_path: Path, scheduling: dict[int, int], options: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        run(tmp_path, scheduling, enable=False, **options)


def test_two_of_them_are_refused(tmp_path: Path) -> None:
    two = {name: GradientAccumulationScheduler({0: 2}) for name in ("one", "other")}
    with pytest.raises(ConfigError, match="one, other all say"):
        tiny(tmp_path, callbacks=two, enable=False).fit()


def test_the_debug_preset_takes_one_batch_all_the_same(tmp_path: Path) -> None:
    callbacks = {"scheduler": GradientAccumulationScheduler({0: 4})}
    trainer = TinyTrainer(debug(tiny_config(tmp_path, callbacks=callbacks)))
    trainer.fit()
    assert trainer.progress.num_batches == trainer.global_step == 1
