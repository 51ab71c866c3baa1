"""What ends a run, what it does on the way, and how it is continued."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import (
    Points,
    RecordingCallback,
    TinyTrainer,
    differences,
    exact_state,
    flat,
    tiny,
)
from torch.utils.data import DataLoader

from dream_trainer.callbacks import Callback, CheckpointCallback
from dream_trainer.errors import ConfigError

# A run seeds the global streams.
pytestmark = pytest.mark.may_leave("rng")


def rows(trainer: Any) -> list[dict[str, Any]]:
    text = (trainer.run_directory / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_train_steps_per_epoch_ends_the_epoch_early(tmp_path: Path) -> None:
    trainer = tiny(tmp_path, n_epochs=3, train_steps_per_epoch=2, num_samples=24)
    trainer.fit()
    assert (trainer.global_step, trainer.current_epoch) == (6, 3)
    assert trainer.num_training_steps == 6
    assert [row["step"] for row in rows(trainer) if "val/loss" in row] == [2, 4, 6]


def test_max_steps_inside_an_epoch_and_then_more_equals_a_straight_run(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "n_epochs": None,
        "dropout": 0.3,
        "num_samples": 20,
        "gradient_accumulation_steps": 2,
    }
    straight = tiny(tmp_path, experiment="straight", max_steps=8, **options)
    straight.fit()
    parts = tiny(tmp_path, experiment="parts", max_steps=2, **options)
    parts.fit()
    assert (parts.global_step, parts.current_epoch, parts.progress.in_epoch) == (2, 0, True)
    again = tiny(tmp_path, experiment="parts", max_steps=5, **options)
    again.fit()
    again.training_parameters.max_steps = 8  # and on in the same process
    again.fit()
    assert differences(exact_state(straight), exact_state(again)) == []
    assert straight.seen == parts.seen + again.seen
    assert rows(straight) == rows(again)


def test_an_epoch_that_a_limit_leaves_open_is_finished_by_the_next_run(tmp_path: Path) -> None:
    recording = RecordingCallback()
    trainer = tiny(
        tmp_path,
        callbacks={"recording": recording},
        n_epochs=1,
        max_steps=4,
        num_samples=24,
        enable=False,
    )
    trainer.fit()
    assert "post_train_epoch" not in recording.calls
    assert "pre_validation_epoch" not in recording.calls
    trainer.training_parameters.max_steps = None
    trainer.fit()
    assert recording.calls.count("pre_epoch") == recording.calls.count("post_epoch") == 1
    assert recording.calls.count("pre_validation_epoch") == 1
    assert trainer.current_epoch == 1


def test_max_steps_at_the_end_of_an_epoch_finishes_it(tmp_path: Path) -> None:
    trainer = tiny(tmp_path, n_epochs=None, max_steps=6, num_samples=24, enable=False)
    trainer.fit()
    assert (trainer.current_epoch, trainer.progress.in_epoch) == (1, False)


def test_max_time_ends_the_run_by_the_trainers_clock_and_counts_over_restarts(
    tmp_path: Path,
) -> None:
    class Timed(TinyTrainer):
        """Every look at the clock takes a second."""

        now = 0.0

        def clock(self) -> float:
            self.now += 1.0
            return self.now

    options: dict[str, Any] = {"n_epochs": None, "num_samples": 40, "max_time": 3.0}
    trainer = tiny(tmp_path, Timed, **options)
    trainer.fit()
    assert (trainer.global_step, trainer.progress.seconds) == (3, 3.0)
    options["max_time"] = 5.0
    again = tiny(tmp_path, Timed, **options)
    again.fit()
    assert (again.global_step, again.progress.seconds) == (5, 5.0)


def test_the_first_limit_that_is_reached_ends_the_run(tmp_path: Path) -> None:
    trainer = tiny(tmp_path, n_epochs=1, max_steps=99, num_samples=8, enable=False)
    trainer.fit()
    assert trainer.global_step == 2


@pytest.mark.parametrize("every", [2, 3, 4])
def test_val_every_n_steps_validates_then_and_never_twice(tmp_path: Path, every: int) -> None:
    trainer = tiny(
        tmp_path, n_epochs=2, num_samples=16, val_every_n_steps=every, val_every_n_epochs=1
    )
    trainer.fit()
    validated = [row["step"] for row in rows(trainer) if "val/loss" in row]
    assert validated == sorted({4, 8} | set(range(every, 9, every)))


def test_how_often_one_validates_does_not_change_what_is_trained(tmp_path: Path) -> None:
    states = []
    for every in (1, 3, None):
        trainer = tiny(tmp_path, val_every_n_steps=every, dropout=0.3, augment=True, enable=False)
        trainer.fit()
        states.append(flat(trainer.state_dict()["models"]))
    assert states[0] == states[1] == states[2]


def test_val_steps_per_epoch_limits_a_validation(tmp_path: Path) -> None:
    recording = RecordingCallback()
    trainer = tiny(
        tmp_path,
        callbacks={"recording": recording},
        n_epochs=1,
        val_steps_per_epoch=2,
        enable=False,
    )
    trainer.fit()
    assert recording.calls.count("pre_validation_step") == 2


def test_sanity_steps_leave_no_trace(tmp_path: Path) -> None:
    class Logs(TinyTrainer):
        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            torch.rand(3)
            self.log_dict({"of_validation": 1.0})
            return super().validation_step(batch, batch_idx)

    trainers = []
    for steps in (0, 2):
        trainer = tiny(
            tmp_path,
            Logs,
            experiment=f"sanity-{steps}",
            num_sanity_val_steps=steps,
            dropout=0.3,
        )
        trainer.fit()
        trainers.append(trainer)
    assert differences(*map(exact_state, trainers)) == []
    assert rows(trainers[0]) == rows(trainers[1])


def test_what_a_validation_step_logs_belongs_to_the_validation(tmp_path: Path) -> None:
    class Logs(TinyTrainer):
        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            self.log_dict({"of_validation": float(batch_idx)})
            return super().validation_step(batch, batch_idx)

    trainer = tiny(tmp_path, Logs, n_epochs=2)
    trainer.fit()
    logged = [row for row in rows(trainer) if "of_validation" in row]
    assert [(row["step"], row["of_validation"]) for row in logged] == [(6, 1.0), (12, 1.0)]
    assert all("val/loss" in row and "train/loss" not in row for row in logged)


class Stops(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def post_train_step(self, trainer: Any, result: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            trainer.stop("seen enough")


def test_stop_ends_the_run_after_the_step_and_saves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = tiny(tmp_path, callbacks={"stops": Stops(3)}, num_samples=40)
    trainer.fit()
    assert (trainer.global_step, trainer.stop_reason) == (3, "seen enough")
    assert "seen enough at step 3, in epoch 1" in capsys.readouterr().out
    assert trainer.checkpointer.store.newest().manifest.step == 3


def test_fit_after_a_stop_goes_on(tmp_path: Path) -> None:
    straight = tiny(tmp_path, dropout=0.3, enable=False)
    straight.fit()
    trainer = tiny(tmp_path, callbacks={"stops": Stops(3)}, dropout=0.3, enable=False)
    trainer.fit()
    trainer.fit()
    assert trainer.stop_reason is None
    assert differences(exact_state(straight), exact_state(trainer)) == []


def test_fit_twice_trains_once(tmp_path: Path) -> None:
    trainer = tiny(tmp_path, dropout=0.3)
    trainer.fit()
    state, log = exact_state(trainer), rows(trainer)
    trainer.fit()
    assert differences(state, exact_state(trainer)) == []
    assert rows(trainer) == log


# ---------------------------------------------------------------------- validation, test, predict


def test_without_a_validation_loader_there_is_no_validation(tmp_path: Path) -> None:
    recording = RecordingCallback()
    trainer = tiny(
        tmp_path,
        callbacks={"recording": recording},
        has_validation=False,
        val_every_n_steps=2,
        num_sanity_val_steps=2,
    )
    trainer.fit()
    assert [name for name in recording.calls if "validation" in name] == []
    assert trainer.current_epoch == 2
    with pytest.raises(ConfigError, match="val_dataloader is None"):
        trainer.validate()


class Modes(TinyTrainer):
    def configure_models(self) -> None:
        super().configure_models()
        self.frozen = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.BatchNorm1d(3))
        self.frozen.requires_grad_(False)
        self.frozen.eval()
        self.modes: list[tuple[bool, ...]] = []

    def compute_loss(self, batch: Any, batch_idx: int) -> Any:
        net, frozen = self.named_models().values()
        parts = (net, *net.children(), frozen, *frozen.children())
        self.modes.append((torch.is_grad_enabled(), *(part.training for part in parts)))
        return super().compute_loss(batch, batch_idx)


def test_every_module_is_back_in_its_own_mode_after_a_validation(tmp_path: Path) -> None:
    trainer = tiny(tmp_path, Modes, n_epochs=1, num_samples=12, val_every_n_steps=1, enable=False)
    trainer.prepare()
    # A part of the trained model is in eval mode on purpose.
    trainer.get_module("net.2").eval()
    trainer.fit()
    training = (True, True, True, True, False, True, False, False, False)
    assert {modes for modes in trainer.modes if modes[0]} == {training}
    assert {modes for modes in trainer.modes if not modes[0]} == {(False,) * 9}


class Predicts(TinyTrainer):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(batch["x"])


def test_validate_test_and_predict_use_the_state_that_fit_would_go_on_from(
    tmp_path: Path,
) -> None:
    fitted = tiny(tmp_path, Predicts, dropout=0.4)
    fitted.fit()
    fresh = tiny(tmp_path, Predicts, dropout=0.4)
    loader = DataLoader(Points(10, seed=6), batch_size=4)
    results = fresh.validate()
    assert results == {"val/loss": rows(fitted)[-1]["val/loss"]}
    assert fresh.test(loader) == {"test/loss": results["val/loss"]}
    made = torch.cat(fresh.predict(loader))
    losses = (made - Points(10, seed=6).y.float()).square()
    assert not made.requires_grad
    assert float(losses.mean()) == pytest.approx(results["val/loss"], rel=1e-6)
    assert differences(exact_state(fitted), exact_state(fresh)) == []
    assert rows(fresh) == rows(fitted)


def test_a_validation_by_hand_does_not_change_the_run(tmp_path: Path) -> None:
    straight = tiny(tmp_path, experiment="straight", dropout=0.3)
    straight.fit()
    trainer = tiny(tmp_path, experiment="looked-at", max_steps=3, dropout=0.3)
    trainer.validate()
    trainer.fit()
    trainer.validate()
    again = tiny(tmp_path, experiment="looked-at", dropout=0.3)
    again.validate()
    again.fit()
    assert differences(exact_state(straight), exact_state(again)) == []
    assert rows(straight) == rows(again)


def test_predict_without_predict_step_says_what_to_write(tmp_path: Path) -> None:
    with pytest.raises(NotImplementedError, match="TinyTrainer has no predict_step; write one"):
        tiny(tmp_path, enable=False).predict([1])


# ---------------------------------------------------------------------- loaders of other kinds


class Unknown(TinyTrainer):
    """A loader without a length; it draws its noise as it goes."""

    def configure_dataloaders(self) -> Any:
        count = self.config.num_samples

        class Stream:
            def __iter__(self) -> Any:
                for batch in DataLoader(Points(count), batch_size=4):
                    yield batch | {"x": batch["x"] + torch.rand(3)}

        return Stream(), None


@pytest.mark.filterwarnings("ignore:Stream has no state_dict")
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_loader_without_length_trains_and_resumes_exactly(
    tmp_path: Path, accumulation: int
) -> None:
    options: dict[str, Any] = {
        "num_samples": 20,
        "gradient_accumulation_steps": accumulation,
        "dropout": 0.3,
    }
    straight = tiny(tmp_path, Unknown, experiment="straight", n_epochs=2, **options)
    straight.fit()
    per_epoch = {1: 5, 2: 3}[accumulation]
    assert (straight.global_step, straight.current_epoch) == (2 * per_epoch, 2)
    steps = range(1, 2 * per_epoch)
    for step in steps:
        name = f"cut-{step}"
        tiny(tmp_path, Unknown, experiment=name, max_steps=step, **options).fit()
        again = tiny(tmp_path, Unknown, experiment=name, n_epochs=2, **options)
        again.fit()
        assert differences(exact_state(straight), exact_state(again)) == [], step
        assert rows(straight) == rows(again)


def test_the_number_of_steps_is_unknown_without_length_and_max_steps(tmp_path: Path) -> None:
    trainer = tiny(tmp_path, Unknown, n_epochs=2, enable=False)
    trainer.prepare()
    with pytest.raises(ConfigError, match="Set max_steps, or n_epochs with a train loader"):
        _ = trainer.num_training_steps


# ---------------------------------------------------------------------- checkpoints in a run


def saved_steps(trainer: Any) -> list[tuple[int, int]]:
    return [(s.manifest.step, s.manifest.epoch) for s in trainer.checkpointer.store.list()]


def test_checkpoints_are_saved_when_the_triggers_say(tmp_path: Path) -> None:
    trainer = tiny(
        tmp_path,
        n_epochs=2,
        num_samples=20,
        every_n_steps=2,
        every_n_epochs=None,
        keep_last=9,
    )
    trainer.fit()
    assert saved_steps(trainer) == [(2, 0), (4, 0), (6, 1), (8, 1), (10, 2)]


def test_every_n_minutes_goes_by_rank_zeros_clock(tmp_path: Path) -> None:
    now = iter(range(0, 10_000, 40))
    trainer = tiny(
        tmp_path,
        callbacks={"checkpoint": CheckpointCallback(clock=lambda: float(next(now)))},
        n_epochs=1,
        num_samples=24,
        every_n_epochs=None,
        every_n_minutes=1.5,
        keep_last=9,
    )
    trainer.fit()
    # One look at the clock a step, and one a save: due at each third step.
    assert saved_steps(trainer) == [(3, 0), (6, 1)]


def test_without_checkpoints_nothing_is_written(tmp_path: Path) -> None:
    trainer = tiny(tmp_path, enable=False)
    trainer.fit()
    assert list(tmp_path.iterdir()) == []
    assert not trainer.writes_run_directory


class ThreeSteps(TinyTrainer):
    """As reinforcement learning has it: several steps on what a batch stands for."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        for _ in range(3):
            loss = self.compute_loss(batch, batch_idx)
            self.backward(loss)
            self.step()
        return loss


def test_triggers_are_not_missed_by_batches_of_several_steps(tmp_path: Path) -> None:
    validated: list[int] = []

    class Validations(Callback):
        def post_validation_epoch(self, trainer: Any, results: Any) -> None:
            validated.append(trainer.global_step)

    trainer = tiny(
        tmp_path,
        ThreeSteps,
        max_steps=25,
        n_epochs=None,
        val_every_n_steps=5,
        val_every_n_epochs=None,
        every_n_steps=10,
        every_n_epochs=None,
        keep_last=9,
        callbacks={"validations": Validations()},
    )
    trainer.fit()
    # The first places at or after 5, 10, 15, 20 and 25.
    assert validated == [6, 12, 15, 21, 27]
    names = sorted(path.name for path in trainer.checkpointer.store.paths())
    assert names == ["step-00000012", "step-00000021", "step-00000027"]
