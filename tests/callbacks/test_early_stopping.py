"""A run ends when its monitored value says so, stays ended, and goes on if told to wait longer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from support import TinyTrainer, differences, exact_state, tiny

from dream_trainer import EarlyStopping
from dream_trainer.errors import ConfigError

pytestmark = pytest.mark.may_leave("rng")

#: What the validations of a run find, one after the other; the last goes on for ever.
Values = list[float]


class Planned(TinyTrainer):
    """Its validations find what a class attribute says."""

    values: Values

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        number = min(self.current_epoch, len(self.values) - 1)
        return {"score": torch.tensor(self.values[number], dtype=torch.float64)}


def run(root: Path, values: Values, stopping: EarlyStopping, **options: Any) -> Any:
    kind = type("Run", (Planned,), {"values": values})
    defaults = {"n_epochs": 9, "num_samples": 8, "num_val_samples": 4}
    trainer = tiny(root, kind, callbacks={"stopping": stopping}, **defaults | options)
    trainer.fit()
    return trainer


#: Values, options -> epochs trained, what the reason says.
CASES: dict[str, tuple[Values, dict[str, Any], int, str | None]] = {
    "never": ([3, 2, 1, 0, -1, -2, -3, -4, -5], {}, 9, None),
    "patience of 3": ([1, 2, 2, 2], {}, 4, "not got better than 1 in 3 validations"),
    "better in between": ([3, 4, 2, 4, 4, 4], {}, 6, "better than 2 in 3 validations"),
    "patience of 1": ([3, 3], {"patience": 1}, 2, "better than 3 in 1 validation"),
    "rising": ([3, 4, 4, 4, 4], {"mode": "max"}, 5, "better than 4 in 3 validations"),
    "too little better": (
        [3, 2.9, 2.8, 2.7],
        {"min_delta": 0.5},
        4,
        "0.5 better than 3 in 3 validations",
    ),
    "little by little enough": (
        [3, 2.8, 2.4, 2.4, 2.4, 2.4],
        {"min_delta": 0.5},
        6,
        "0.5 better than 2.4 in 3 validations",
    ),
    "good enough": ([3, 2, 0.5], {"stopping_threshold": 1.0}, 3, "0.5, better than 1"),
    "diverges": ([3, 2, 11], {"divergence_threshold": 10.0}, 3, "11, worse than 10"),
    "diverges rising": (
        [3, 2, 0],
        {"mode": "max", "divergence_threshold": 1.0, "patience": 9},
        3,
        "0, worse than 1",
    ),
    "not finite": ([3, float("nan")], {}, 2, "score is nan"),
    "not finite, not looked at": (
        [float("nan"), float("inf"), float("nan"), 2, 2, 2, 2],
        {"check_finite": False},
        7,
        "better than 2 in 3 validations",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_it_stops_when_it_says(tmp_path: Path, case: str) -> None:
    values, options, epochs, reason = CASES[case]
    trainer = run(tmp_path, values, EarlyStopping("val/score", **options), enable=False)
    assert trainer.current_epoch == epochs
    assert (trainer.stop_reason or "None").endswith(str(reason)) or reason in trainer.stop_reason


def test_started_again_it_stays_stopped_and_goes_on_with_more_patience(tmp_path: Path) -> None:
    values: Values = [1, 2, 2, 2, 2, 0.5, 2, 2, 2, 2, 2, 2]
    first = run(tmp_path, values, EarlyStopping("val/score", patience=2))
    assert first.current_epoch == 3
    for n_epochs in (9, 20):
        again = run(tmp_path, values, EarlyStopping("val/score", patience=2), n_epochs=n_epochs)
        assert (again.current_epoch, again.stop_reason) == (3, first.stop_reason)
    patient = run(tmp_path, values, EarlyStopping("val/score", patience=4), n_epochs=20)
    straight = run(
        tmp_path, values, EarlyStopping("val/score", patience=4), n_epochs=20, experiment="straight"
    )
    assert patient.current_epoch == straight.current_epoch == 5
    assert differences(exact_state(patient), exact_state(straight)) == []


def test_it_does_not_lift_a_stop_that_is_not_its_own(tmp_path: Path) -> None:
    class Stops(Planned):
        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            self.stop("enough")
            return {"score": 1.0}

    for _ in range(2):
        callbacks = {"stopping": EarlyStopping("val/score")}
        trainer = tiny(tmp_path, Stops, n_epochs=3, num_samples=8, callbacks=callbacks)
        trainer.fit()
        assert (trainer.current_epoch, trainer.stop_reason) == (1, "enough")


def test_a_callback_of_a_run_before_begins_anew(tmp_path: Path) -> None:
    stopping = EarlyStopping("val/score", patience=2)
    for name in ("one", "other"):
        trainer = run(tmp_path, [2, 3, 3], stopping, experiment=name)
        assert trainer.current_epoch == 3


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_training_value_is_its_mean_over_the_epoch(tmp_path: Path, accumulation: int) -> None:
    class Numbered(TinyTrainer):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            super().training_step(batch, batch_idx)
            return {"number": torch.tensor(float(batch_idx)), "weight": 1 + batch_idx}

    class Looks(EarlyStopping):
        def __init__(self) -> None:
            super().__init__("train/number", patience=2)
            self.found: list[Any] = []

        def post_train_epoch(self, trainer: Any) -> None:
            super().post_train_epoch(trainer)
            self.found.append(trainer.monitored.means)

    looks = Looks()
    trainer = tiny(
        tmp_path,
        Numbered,
        n_epochs=9,
        num_samples=20,
        has_validation=False,
        enable=False,
        callbacks={"stopping": looks},
        gradient_accumulation_steps=accumulation,
    )
    trainer.fit()
    mean = sum(i * (i + 1) for i in range(5)) / 15
    assert looks.found == [{"train/number": pytest.approx(mean)}] * 3
    assert trainer.stop_reason == f"train/number has not got better than {mean:.6g} in 2 epochs"


def test_what_is_not_there_is_named_with_what_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'val/accuracy' is not among .*\(val/score\)"):
        run(tmp_path, [1.0], EarlyStopping("val/accuracy"), enable=False)
    with pytest.raises(
        ConfigError, match=r"'train/accuracy' is not among .*\(lr/net, train/loss\)"
    ):
        run(tmp_path, [1.0], EarlyStopping("train/accuracy"), enable=False)
    with pytest.raises(ConfigError, match="val_dataloader is None"):
        run(tmp_path, [1.0], EarlyStopping(), enable=False, has_validation=False)


@pytest.mark.parametrize(
    "options", [{"mode": "up"}, {"patience": 0}, {"patience": 1.5}, {"min_delta": -1.0}]
)
def test_bad_values_are_refused(options: Mapping[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        EarlyStopping(**options)


def test_a_step_that_was_left_out_is_in_no_mean(tmp_path: Path) -> None:
    class Diverges(TinyTrainer):
        def compute_loss(self, batch: Any, batch_idx: int) -> Any:
            loss = super().compute_loss(batch, batch_idx)
            return loss * float("nan") if batch_idx == 1 and torch.is_grad_enabled() else loss

    trainer = tiny(
        tmp_path,
        Diverges,
        callbacks={"stopping": EarlyStopping("train/loss")},
        on_nonfinite="skip",
        enable=False,
    )
    trainer.fit()
    assert trainer.stop_reason is None
    assert 0 < trainer.monitored.means["train/loss"] < 10
