"""What goes wrong in a run arrives where it can be understood, and nothing bad is kept."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from support import Points, RecordingCallback, TinyTrainer, run_ranks, tiny
from torch.utils.data import DataLoader, IterableDataset

from dream_trainer.callbacks import Callback
from dream_trainer.errors import ConfigError, NonFiniteError

# A run seeds the global streams.
pytestmark = pytest.mark.may_leave("rng")


class BoomError(Exception):
    pass


class Log:
    """The logger protocol, kept in memory."""

    def __init__(self) -> None:
        self.rows: list[tuple[int | None, dict[str, float]]] = []
        self.statuses: list[str] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))

    def finalize(self, status: str) -> None:
        self.statuses.append(status)


def raising_at(place: str, error: BaseException, at: int = 1) -> type[TinyTrainer]:
    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        if place == "training_step" and batch_idx == at:
            raise error
        return TinyTrainer.training_step(self, batch, batch_idx)

    def validation_step(self: Any, batch: Any, batch_idx: int) -> Any:
        if place == "validation_step" and batch_idx == at:
            raise error
        return TinyTrainer.validation_step(self, batch, batch_idx)

    members = {"training_step": training_step, "validation_step": validation_step}
    return type("Raising", (TinyTrainer,), members)


@pytest.mark.parametrize("place", ["training_step", "validation_step"])
@pytest.mark.parametrize("kind", [StopIteration, BoomError, KeyboardInterrupt, SystemExit])
def test_an_exception_in_user_code_arrives_as_it_was_raised(
    tmp_path: Path, place: str, kind: type[BaseException]
) -> None:
    error = kind("mine")
    log, recording = Log(), RecordingCallback()
    seen: list[BaseException] = []

    class Sees(Callback):
        def on_exception(self, trainer: Any, exception: BaseException) -> None:
            seen.append(exception)

    trainer = tiny(
        tmp_path,
        raising_at(place, error),
        callbacks={"recording": recording, "sees": Sees()},
        loggers={"log": log},
        gradient_accumulation_steps=2,
        enable=False,
    )
    with pytest.raises(kind) as caught:
        trainer.fit()
    assert caught.value is error
    is_interrupt = kind is KeyboardInterrupt
    assert recording.calls[-2:] == ["on_interrupt" if is_interrupt else "on_exception", "close"]
    assert seen == ([] if is_interrupt else [error])
    assert log.statuses == ["failed"]
    assert not trainer.is_fitting


def test_a_run_that_succeeds_finalizes_its_loggers_with_success(tmp_path: Path) -> None:
    log = Log()
    tiny(tmp_path, loggers={"log": log}, n_epochs=1, enable=False).fit()
    assert log.statuses == ["success"]
    assert [step for step, _ in log.rows] == [1, 2, 3, 4, 5, 6, 6]
    assert set(log.rows[0][1]) == {"train/loss", "lr/net", "epoch"}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_stop_iteration_in_a_data_set_is_no_end_of_the_data(
    tmp_path: Path, num_workers: int
) -> None:
    class Stops(Points):
        def __getitem__(self, index: int) -> Any:
            if index == 13:
                raise StopIteration
            return super().__getitem__(index)

    class Trainer(TinyTrainer):
        def configure_dataloaders(self) -> Any:
            return DataLoader(Stops(24), batch_size=4, num_workers=num_workers), None

    trainer = tiny(tmp_path, Trainer, enable=False)
    with pytest.raises(RuntimeError, match="does __getitem__ or collate_fn raise StopIteration"):
        trainer.fit()
    assert trainer.current_epoch == 0


def test_stop_iteration_inside_a_generator_of_batches_is_an_error(tmp_path: Path) -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            yield from Points(8)
            next(iter(()))

    class Trainer(TinyTrainer):
        def configure_dataloaders(self) -> Any:
            return DataLoader(Stream(), batch_size=4), None

    with pytest.raises(RuntimeError, match="StopIteration"):
        tiny(tmp_path, Trainer, enable=False).fit()


@pytest.mark.parametrize("hook", ["pre_configure", "post_setup", "pre_fit", "post_fit"])
def test_an_exception_in_a_callback_arrives_too(tmp_path: Path, hook: str) -> None:
    error, recording = BoomError(hook), RecordingCallback()

    def raises(self: Any, trainer: Any) -> None:
        raise error

    raising = type("Raises", (Callback,), {hook: raises})()
    trainer = tiny(
        tmp_path, callbacks={"recording": recording, "raises": raising}, n_epochs=1, enable=False
    )
    with pytest.raises(BoomError) as caught:
        trainer.fit()
    assert caught.value is error
    assert recording.calls[-2:] == ["on_exception", "close"]


def test_a_second_failure_on_the_way_out_does_not_hide_the_first(tmp_path: Path) -> None:
    class Worse(Callback):
        def on_exception(self, trainer: Any, exception: BaseException) -> None:
            raise OSError("disk")

        def close(self, trainer: Any) -> None:
            raise OSError("disk, again")

    log = Log()
    trainer = tiny(
        tmp_path,
        raising_at("training_step", BoomError()),
        callbacks={"worse": Worse()},
        loggers={"log": log},
        enable=False,
    )
    with pytest.warns(UserWarning, match="while closing: OSError: disk"), pytest.raises(BoomError):
        trainer.fit()
    assert log.statuses == ["failed"]


@pytest.mark.distributed
def test_a_rank_that_fails_is_named_by_the_other_one(
    tmp_path: Path,
) -> None:
    def rank() -> tuple[str, list[str], list[str]]:
        log, recording = Log(), RecordingCallback()

        class FailsOnOne(TinyTrainer):
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                if self.world.rank == 1 and batch_idx == 1:
                    raise BoomError("on rank 1")
                return super().training_step(batch, batch_idx)

        trainer = tiny(
            tmp_path,
            FailsOnOne,
            callbacks={"recording": recording},
            loggers={"log": log},
            enable=False,
        )
        try:
            trainer.fit()
        except Exception as error:  # noqa: BLE001 - it is what the test looks at
            name = type(error).__name__
        return name, recording.calls[-2:], log.statuses

    assert run_ranks(2, rank) == [
        ("RankFailedError", ["on_exception", "close"], ["failed"]),
        ("BoomError", ["on_exception", "close"], []),
    ]


# ---------------------------------------------------------------------- not finite


class Diverges(TinyTrainer):
    """The loss of the third batch is NaN."""

    def compute_loss(self, batch: Any, batch_idx: int) -> Any:
        loss = super().compute_loss(batch, batch_idx)
        return loss * float("nan") if batch_idx == 2 and torch.is_grad_enabled() else loss


def test_a_loss_that_is_not_finite_raises_and_names_the_step(tmp_path: Path) -> None:
    trainer = tiny(tmp_path, Diverges, n_epochs=1)
    with pytest.raises(
        NonFiniteError,
        match=r"train/loss is nan at step 3 \(epoch 0, batch 2\); models.net.0.weight is",
    ):
        trainer.fit()
    assert list((trainer.run_directory / "checkpoints").glob("step-*")) == []


def test_a_trainer_that_failed_in_a_step_is_not_used_again(tmp_path: Path) -> None:
    class FailsOnce(TinyTrainer):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.global_step == 2:
                raise ValueError("once")
            return super().training_step(batch, batch_idx)

    trainer = tiny(tmp_path, FailsOnce)
    with pytest.raises(ValueError, match="once"):
        trainer.fit()
    with pytest.raises(RuntimeError, match=r"in the middle of a training step\. Make a new one"):
        trainer.fit()


def test_nothing_that_is_not_finite_is_ever_saved(tmp_path: Path) -> None:
    trainer = tiny(tmp_path, Diverges, n_epochs=1, every_n_steps=1, keep_last=9)
    with pytest.raises(NonFiniteError):
        trainer.fit()
    names = [path.name for path in trainer.checkpointer.store.paths()]
    assert names == ["step-00000001", "step-00000002"]


def test_a_parameter_that_is_not_finite_is_named_before_a_save(tmp_path: Path) -> None:
    class Spoils(Callback):
        def post_optimizer_step(self, trainer: Any, optimizer: Any) -> None:
            if trainer.global_step == 2:
                with torch.no_grad():
                    trainer.net.get_parameter("0.bias")[1] = float("inf")

    class Quiet(TinyTrainer):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            super().training_step(batch, batch_idx)

    trainer = tiny(
        tmp_path,
        Quiet,
        callbacks={"spoils": Spoils()},
        n_epochs=None,
        max_steps=2,
        every_n_steps=1,
    )
    message = r"models.net.0.bias is not finite at step 2 .*no checkpoint was written"
    with pytest.raises(NonFiniteError, match=message):
        trainer.fit()
    names = [path.name for path in trainer.checkpointer.store.paths()]
    assert names == ["step-00000001"]
    with pytest.raises(NonFiniteError, match=message):
        trainer.save_checkpoint(tmp_path / "by-hand")
    assert not (tmp_path / "by-hand").exists()


def test_optimizer_state_that_is_not_finite_is_named_before_a_save(tmp_path: Path) -> None:
    trainer = tiny(tmp_path, max_steps=2, enable=False)
    trainer.fit()
    (optimizer,) = trainer.named_optimizers().values()
    optimizer.state[trainer.net.get_parameter("0.bias")]["exp_avg"][0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"optimizers.net.net.0.bias.exp_avg is not finite"):
        trainer.save_checkpoint(tmp_path / "by-hand")


def test_a_killed_run_after_a_nan_goes_on_from_before_it(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError):
        tiny(tmp_path, Diverges, n_epochs=1, every_n_steps=1).fit()
    healed = tiny(tmp_path, n_epochs=1, every_n_steps=1)
    healed.fit()
    rows = [json.loads(line) for line in _log(healed).splitlines()]
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 2, 3, 4, 5, 6]
    straight = tiny(tmp_path, n_epochs=1, every_n_steps=1, experiment="straight")
    straight.fit()
    assert _log(healed) == _log(straight)


def _log(trainer: Any) -> str:
    return str((trainer.run_directory / "metrics.jsonl").read_text())


class Scored(TinyTrainer):
    """Validation gives a score per epoch, from a list."""

    scores: list[float]

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        return {"score": self.scores[self.current_epoch]}


@pytest.mark.parametrize(
    ("mode", "scores", "best"),
    [
        ("min", [-1.0, -3.0, -2.0, 0.0], 1),
        ("max", [-3.0, -1.0, -2.0, -4.0], 1),
        ("min", [float("nan"), 2.0, float("nan"), 5.0], 1),
        ("max", [float("nan"), 0.0, float("-inf"), float("nan")], 1),
    ],
)
def test_a_monitored_value_may_be_negative_or_nan(
    tmp_path: Path, mode: str, scores: list[float], best: int
) -> None:
    trainer = tiny(
        tmp_path,
        type("Trainer", (Scored,), {"scores": scores}),
        n_epochs=4,
        num_samples=8,
        monitor="val/score",
        mode=mode,
        keep_last=1,
    )
    trainer.fit()
    steps = [one.manifest.step for one in trainer.checkpointer.store.list()]
    assert steps == [2 * (best + 1), 8]
    stored = trainer.checkpointer.store.best(mode, "val/score")
    assert stored.manifest.step == 2 * (best + 1)


def test_a_monitor_that_no_validation_gives_is_said(tmp_path: Path) -> None:
    trainer = tiny(tmp_path, n_epochs=1, monitor="val/los")
    with pytest.warns(UserWarning, match=r"'val/los' is not among .*\(val/loss\)"):
        trainer.fit()


# ---------------------------------------------------------------------- refused early


def test_a_run_that_nothing_ends_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing ends the run"):
        tiny(tmp_path, n_epochs=None).fit()


def test_an_empty_train_loader_is_refused(tmp_path: Path) -> None:
    class Empty(TinyTrainer):
        def configure_dataloaders(self) -> Any:
            return DataLoader(Points(3), batch_size=4, drop_last=True), None

    with pytest.raises(ConfigError, match=r"train_dataloader: it has no batches \(batch_size 4"):
        tiny(tmp_path, Empty, enable=False).fit()


def test_deterministic_kernels_are_asked_for_during_the_run_only(tmp_path: Path) -> None:
    asked = []

    class Looks(Callback):
        def pre_train_step(self, trainer: Any, batch: Any, batch_idx: int) -> None:
            asked.append(torch.are_deterministic_algorithms_enabled())

    callbacks = {"looks": Looks()}
    tiny(tmp_path, callbacks=callbacks, max_steps=1, deterministic=True, enable=False).fit()
    assert asked == [True]
    assert not torch.are_deterministic_algorithms_enabled()


def test_detect_anomaly_names_the_forward_operation_and_ends_with_the_run(tmp_path: Path) -> None:
    class SquareRoot(TinyTrainer):
        def compute_loss(self, batch: Any, batch_idx: int) -> Any:
            return (self.net(batch["x"]) * 0).sqrt().sum()

    trainer = tiny(tmp_path, SquareRoot, detect_anomaly=True, enable=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(RuntimeError, match="returned nan values"):
            trainer.fit()
    assert not torch.is_anomaly_enabled()
