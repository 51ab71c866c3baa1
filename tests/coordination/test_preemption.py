"""A scheduler's signal, in any phase, ends all ranks with 143; the run then goes on exactly."""

from __future__ import annotations

import json
import os
import signal
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ending_ranks import Ended, run_to_the_end
from support import TinyTrainer, differences, exact_state, run_ranks, tiny

from dream_trainer.callbacks import Callback
from dream_trainer.checkpointing import CheckpointStore
from dream_trainer.configs import TrainingParameters
from dream_trainer.coordination import Preempted
from dream_trainer.errors import ConfigError

pytestmark = [pytest.mark.distributed, pytest.mark.may_leave("rng")]

OPTIONS: dict[str, Any] = {
    "n_epochs": 2,
    "gradient_accumulation_steps": 2,
    "dropout": 0.2,
    "augment": True,
    "num_samples": 24,
    "batch_size": 2,
    "val_every_n_steps": 2,
    "every_n_epochs": None,
    "every_n_steps": 3,
}


class Signalled(TinyTrainer):
    """Gets a signal in a phase, on its last rank."""

    phase, number, is_sent = "", signal.SIGTERM, False

    def arrive(self, phase: str, when: bool = True) -> None:
        if phase == self.phase and when and not self.is_sent:
            environment_rank = int(os.environ.get("RANK", "0"))
            if environment_rank == int(os.environ.get("WORLD_SIZE", "1")) - 1:
                self.is_sent = True
                os.kill(os.getpid(), self.number)

    def configure_models(self) -> None:
        self.arrive("setup")
        super().configure_models()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        last_epoch = self.current_epoch == 1
        self.arrive("step", batch_idx == 1)
        self.arrive("accumulation", batch_idx == 2)
        self.arrive("last epoch", last_epoch and batch_idx == 0)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.arrive("validation", batch_idx == 0)
        return super().validation_step(batch, batch_idx)

    def state_dict(self) -> dict[str, Any]:
        self.arrive("save")
        return super().state_dict()


class BeforeLaunch(Callback):
    def pre_launch(self, trainer: Any) -> None:
        trainer.arrive("before launch")


def trained(root: Path, phase: str, number: int = signal.SIGTERM, **options: Any) -> Any:
    kind = type("Kind", (Signalled,), {"phase": phase, "number": number})
    callbacks = {"before": BeforeLaunch()} | options.pop("callbacks", {})
    trainer = tiny(root, kind, callbacks=callbacks, **OPTIONS | options)
    trainer.fit()
    return exact_state(trainer)


def fit(root: Path, phase: str, number: int, options: dict[str, Any]) -> None:
    trained(root, phase, number, **options)


def checkpoints(root: Path, experiment: str = "tiny") -> CheckpointStore:
    return CheckpointStore(root / "default" / "default" / experiment / "checkpoints")


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Any]:
    """State and log of a run that nothing disturbed, by number of ranks."""
    runs: dict[int, Any] = {}

    def run(size: int) -> Any:
        if size not in runs:
            root = tmp_path_factory.mktemp(f"straight{size}")
            runs[size] = run_ranks(size, trained, root, ""), log(root)
        return runs[size]

    return run


def log(root: Path) -> list[Any]:
    path = root / "default" / "default" / "tiny" / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


PHASES = [
    "before launch",
    "setup",
    "step",
    "accumulation",
    "validation",
    "save",
    "last epoch",
]


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("phase", PHASES)
def test_a_run_that_is_preempted_goes_on_to_the_same_end(
    tmp_path: Path, straight: Callable[[int], Any], phase: str, size: int
) -> None:
    number = signal.SIGTERM if PHASES.index(phase) % 2 else signal.SIGUSR1
    ended = run_to_the_end(tmp_path, size, fit, tmp_path, phase, number, {})
    assert ended.statuses == [143] * size, ended
    if phase in ("before launch", "setup"):
        # Two ranks may have begun the first batch before one of them could tell the other.
        assert len(checkpoints(tmp_path).list()) <= size - 1
    else:
        assert checkpoints(tmp_path).list()
    states = run_ranks(size, trained, tmp_path, "")
    expected, rows = straight(size)
    assert [differences(*pair) for pair in zip(expected, states, strict=True)] == [[]] * size
    assert log(tmp_path) == rows


def stuck(root: Path, rank_that_hangs: int, stops_before: bool) -> None:
    class Stuck(TinyTrainer):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.global_step == 4:
                if stops_before:
                    self.stop("enough")
                os.kill(os.getpid(), signal.SIGTERM)
                if self.world.rank == rank_that_hangs:
                    threading.Event().wait()
            return super().training_step(batch, batch_idx)

    tiny(root, Stuck, grace_seconds=1.0, every_n_steps=3, batch_size=2).fit()


@pytest.mark.parametrize(
    ("size", "stops_before"), [(1, False), (2, False), (2, True)], ids=["1", "2", "2-stopping"]
)
def test_a_step_that_outlasts_the_grace_is_given_up(
    tmp_path: Path, size: int, stops_before: bool
) -> None:
    ended = run_to_the_end(tmp_path, size, stuck, tmp_path, size - 1, stops_before)
    # The other rank waits in a collective: in C++, where no signal handler of Python runs.
    assert ended.statuses == [143] * size, ended
    assert any("grace_seconds=1" in line for line in ended.lines)
    assert [one.manifest.step for one in checkpoints(tmp_path).list()] == [3]


class AfterTheOther(Callback):
    """Rank 1 gets a signal in its last batch, when rank 0 has nothing left but to leave."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def close(self, trainer: Any) -> None:
        self.mark.touch()

    def post_train_step(self, trainer: Any, *_: Any) -> None:
        if trainer.world.rank == 1 and trainer.progress.last_batch_finished:
            while not self.mark.exists():
                os.sched_yield()
            os.kill(os.getpid(), signal.SIGTERM)


def ends_one_by_one(root: Path) -> None:
    # Without metrics and checkpoints nothing but the gradients binds the ranks together.
    callbacks = {"after": AfterTheOther(root / "closed"), "metrics": None, "checkpoint": None}
    options: dict[str, Any] = {"n_epochs": 1, "num_samples": 8, "batch_size": 2}
    tiny(root, callbacks=callbacks, val_every_n_epochs=None, enable=False, **options).fit()


def test_a_signal_that_comes_too_late_for_a_stop_does_no_harm(tmp_path: Path) -> None:
    ended = run_to_the_end(tmp_path, 2, ends_one_by_one, tmp_path)
    assert ended.statuses == [0, 0], ended


def signalled_together(root: Path) -> None:
    class Together(TinyTrainer):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.global_step == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().training_step(batch, batch_idx)

    tiny(root, Together).fit()


def test_a_signal_to_all_ranks_is_answered_by_one(tmp_path: Path) -> None:
    ended = run_to_the_end(tmp_path, 2, signalled_together, tmp_path)
    assert ended.statuses == [143, 143], ended
    assert sum("SIGTERM: stopping" in line for line in ended.lines) == 1, ended


def unheard(root: Path) -> None:
    class Alone(TinyTrainer):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.global_step == 1 and not self.is_resumed:
                reader, writer = os.pipe()
                os.close(reader)
                os.dup2(writer, 2)  # what ``2>&1 | tee`` leaves when the signal reaches it, too
                os.kill(os.getpid(), signal.SIGTERM)
            return super().training_step(batch, batch_idx)

    tiny(root, Alone).fit()


def test_a_signal_counts_though_nobody_reads_what_is_printed(tmp_path: Path) -> None:
    assert run_to_the_end(tmp_path, 1, unheard, tmp_path).statuses == [143]
    assert [one.manifest.step for one in checkpoints(tmp_path).list()] == [2]


def test_ctrl_c_ends_a_script_with_130(tmp_path: Path) -> None:
    ended = run_to_the_end(tmp_path, 2, fit, tmp_path, "step", signal.SIGINT, {})
    assert ended.statuses == [130, 130], ended
    assert checkpoints(tmp_path).list()


def stopped(root: Path, ranks: tuple[int, ...], hook: str) -> Any:
    class Stops(Callback):
        pass

    def stop(self: Any, trainer: Any, *_: Any) -> None:
        if trainer.world.rank in ranks and trainer.global_step == 2:
            trainer.stop("enough")

    setattr(Stops, hook, stop)
    trainer = tiny(root, callbacks={"stops": Stops()}, **OPTIONS)
    trainer.fit()
    again = tiny(root, **OPTIONS)
    again.fit()
    assert again.local_batches == 0, "the same command finds the run done"
    return trainer.global_step, trainer.stop_reason, again.stop_reason


@pytest.mark.parametrize("hook", ["post_train_step", "post_validation_epoch", "on_boundary"])
@pytest.mark.parametrize("ranks", [(1,), (0,), (0, 1)], ids=["rank 1", "rank 0", "both"])
def test_any_rank_stops_all_after_the_same_step(
    tmp_path: Path, ranks: tuple[int, ...], hook: str
) -> None:
    results = run_ranks(2, stopped, tmp_path, ranks, hook)
    assert results[0] == results[1]
    step, *reasons = results[0]
    assert reasons == ["enough", "enough"]
    if len(ranks) == 2:
        assert step == 2
    else:
        assert step in (2, 3)


def slurm(root: Path, number: int) -> Ended:
    fake = root / "bin" / "scontrol"
    fake.parent.mkdir()
    fake.write_text(f'#!/bin/sh\necho "$@" >> {root}/requeued\n')
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    job = {"SLURM_JOB_ID": "41", "SLURM_ARRAY_JOB_ID": "40", "SLURM_ARRAY_TASK_ID": "7"}
    job |= {"PATH": f"{fake.parent}:{os.environ['PATH']}"}

    def run() -> None:
        os.environ.update(job)
        fit(root, "step", number, {})

    return run_to_the_end(root, 2, run)


def test_a_slurm_job_is_put_back_into_the_queue_once(tmp_path: Path) -> None:
    assert slurm(tmp_path, signal.SIGUSR1).statuses == [143, 143]
    assert (tmp_path / "requeued").read_text() == "requeue 40_7\n"


def test_a_slurm_job_that_is_cancelled_stays_away(tmp_path: Path) -> None:
    assert slurm(tmp_path, signal.SIGTERM).statuses == [143, 143]
    assert not (tmp_path / "requeued").exists()


def test_a_program_may_go_on_after_a_preemption(tmp_path: Path) -> None:
    with pytest.raises(Preempted) as caught:
        trained(tmp_path, "step", signal.SIGUSR1)
    assert (caught.value.code, caught.value.signal_name) == (143, "SIGUSR1")
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def preempted_and_continued(root: Path) -> int:
    with pytest.raises(Preempted):
        trained(root, "step")
    trainer = tiny(root, **OPTIONS)
    trainer.fit()
    return trainer.global_step


def test_a_program_of_two_ranks_may_go_on_after_a_preemption(tmp_path: Path) -> None:
    assert run_ranks(2, preempted_and_continued, tmp_path) == [6, 6]


def test_a_signal_ends_a_prediction(tmp_path: Path) -> None:
    class Predicts(TinyTrainer):
        def predict_step(self, batch: Any, batch_idx: int) -> None:
            assert batch_idx == 0
            os.kill(os.getpid(), signal.SIGTERM)

    trainer = tiny(tmp_path, Predicts)
    with pytest.raises(Preempted):
        trainer.predict(trainer.configure_dataloaders()[1])


def test_signals_that_cannot_be_caught_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"'SIGKILL'[\s\S]*'SIGWHAT'"):
        TrainingParameters(preemption_signals=["SIGKILL", "SIGWHAT"])
    with pytest.raises(ConfigError, match="not a list of names"):
        TrainingParameters(preemption_signals="SIGTERM")  # type: ignore[arg-type]
