"""verify_resume tells a trainer that resumes exactly from one that does not, and why not."""

from __future__ import annotations

import copy
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from support import Points, TinyConfig, TinyTrainer, tiny_config
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from dream_trainer import Callback, verify_resume
from dream_trainer.errors import ConfigError
from dream_trainer.trainer import DreamTrainer
from dream_trainer.verification.observer import Place
from dream_trainer.verification.runs import Runner


@dataclass(kw_only=True)
class LineConfig(TinyConfig):
    folder: str = ""
    """Where a trainer leaves notes for its test."""


class Line(DreamTrainer):
    """A trainer without fault; five batches of samples with noise, dropout, a scheduler."""

    config: LineConfig

    def configure_models(self) -> None:
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.2), nn.Linear(4, 1))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), lr=0.05, momentum=0.9)

    def configure_schedulers(self) -> Any:
        (optimizer,) = self.named_optimizers().values()
        return torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.7)

    def configure_dataloaders(self) -> Any:
        return DataLoader(Points(20, augment=True), batch_size=4, shuffle=True), None

    def compute_loss(self, batch: Any, batch_idx: int) -> Any:
        return (self.net(batch["x"]) - batch["y"]).square().mean()


def line_config(root: Path, **options: Any) -> LineConfig:
    """Of a run that would be long, write checkpoints seldom, and go on at a path."""
    made = tiny_config(root / "runs", n_epochs=3, every_n_epochs=3, **options)
    return LineConfig(**vars(made), folder=str(root))


def verify(kind: Any, root: Path, *, callbacks: Any = (), **options: Any) -> Any:
    """Three steps, killed after the second."""
    config = line_config(root, callbacks=dict(callbacks))
    return verify_resume(kind, config, **{"steps": 3, "every": 2, "tell": None} | options)


# ---------------------------------------------------------------------- without fault


class Everything(TinyTrainer):
    """Windows, validation, metrics, workers."""

    def configure_metrics(self) -> None:
        self.error = MeanMetric()

    def compute_loss(self, batch: Any, batch_idx: int) -> Any:
        loss = super().compute_loss(batch, batch_idx)
        self.error.update(loss)
        self.seen.clear()
        return loss


def test_a_trainer_without_fault_is_exact_at_every_step_and_end_of_epoch(tmp_path: Path) -> None:
    config = tiny_config(
        tmp_path,
        dropout=0.3,
        augment=True,
        num_samples=18,
        gradient_accumulation_steps=2,
        val_every_n_steps=2,
        num_sanity_val_steps=1,
        monitor="val/loss",
    )
    before, parts = copy.deepcopy(config), dict(vars(config))
    told: list[str] = []

    report = verify_resume(Everything, config, steps=5, tell=told.append)

    assert report.is_exact, report
    assert (report.steps, report.kills) == (5, (1, 2, 3, 3, 4, 5))
    assert report.num_values > 30
    assert str(report) == (
        f"exact: 5 steps, killed and resumed after each; {report.num_values} values compared"
    )
    assert [line.partition(",")[0] for line in told[1:]] == [
        "straight run again: exact",
        "killed after step 1",
        "killed after step 2",
        "killed after step 3",
        "killed after the end of epoch 0 (step 3)",
        "killed after step 4",
        "killed after step 5",
    ]
    assert config == before
    assert all(vars(config)[name] is value for name, value in parts.items())
    assert list(tmp_path.iterdir()) == []


def test_a_report_says_what_did_not_happen_within_its_steps(tmp_path: Path) -> None:
    report = verify_resume(Everything, tiny_config(tmp_path), steps=1, tell=None)
    assert report.is_exact
    assert "no epoch ended and no validation ran" in str(report)
    assert "train_steps_per_epoch=1" in str(report)

    config = tiny_config(tmp_path, n_epochs=1, num_samples=8)
    report = verify_resume(Everything, config, steps=3, every=3, tell=None)
    assert report.is_exact
    assert (report.steps, report.kills) == (2, (2,))
    assert report.notes == ("the configuration ends the run after 2 of 3 steps",)


def test_a_run_without_seed_name_or_checkpoints_is_verified_all_the_same(tmp_path: Path) -> None:
    config = line_config(tmp_path, seed=None, experiment=None, enable=False, resume="must")
    config.callbacks["checkpoint"] = None
    config.loggers = {"raises": SimpleNamespace(log_metrics=None, finalize=None)}
    report = verify_resume(Line, config, steps=2, every=1, tell=None)
    assert report.is_exact, report
    assert (config.seed, config.experiment) == (None, None)


class StepsEverySecondBatch(Line):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.compute_loss(batch, batch_idx)
        self.backward(loss)
        if batch_idx % 2:
            self.step()
        return {"loss": loss}


def test_batches_without_a_step_are_places_of_their_own(tmp_path: Path) -> None:
    report = verify(StepsEverySecondBatch, tmp_path, steps=2, every=1)
    assert report.is_exact, report
    assert report.kills == (0, 1, 2)


# ---------------------------------------------------------------------- two straight runs differ


class OwnNoise(Points):
    """A data set that asks the system for noise, or counts how often it was asked."""

    def __init__(self, is_counted: bool) -> None:
        super().__init__(20)
        self.is_counted, self.count, self.noise = is_counted, 0, 0.0

    def __getitem__(self, index: int) -> Any:
        item = super().__getitem__(index)
        self.count += 1
        self.noise = self.count / 100 if self.is_counted else np.random.default_rng().random()
        return {**item, "x": item["x"] + self.noise}


class UnseededData(Line):
    is_counted = False

    def configure_dataloaders(self) -> Any:
        return DataLoader(OwnNoise(self.is_counted), batch_size=4), None


class UnseededWeights(Line):
    def init_weights(self) -> None:
        self.net[0].weight.data.mul_(float(np.random.default_rng().random()))


class DrawsBeforeTheSeed(Line):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.start = nn.Parameter(torch.tensor(float(np.random.rand())))

    def init_weights(self) -> None:
        self.net[0].bias.data.fill_(self.start.item())


class UnseededStep(Line):
    def compute_loss(self, batch: Any, batch_idx: int) -> Any:
        return super().compute_loss(batch, batch_idx) * float(np.random.default_rng().random())


class SeedsFromTheClock(Callback):
    def post_train_step(self, trainer: Any, result: Any, batch: Any, batch_idx: int) -> None:
        torch.seed()


class LogsTheClock(Line):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("train/clock", time.perf_counter())
        return super().training_step(batch, batch_idx)


class KeepsTheClock(Callback):
    def state_dict(self) -> dict[str, Any]:
        return {"now": time.perf_counter()}

    def load_state_dict(self, state: Any) -> None:
        pass


class StopsTheFirstTime(Callback):
    def post_train_step(self, trainer: Any, result: Any, batch: Any, batch_idx: int) -> None:
        flag = Path(trainer.config.folder) / "flag"
        if trainer.global_step == 2 and not flag.exists():
            flag.touch()
            trainer.stop("enough")


STRAIGHT = {
    "data": (UnseededData, {}, "batches.0.x", 1, "data set or loader.*may be dataset.noise"),
    "weights": (UnseededWeights, {}, "models.net.0.weight", 0, "configure_models"),
    "global": (DrawsBeforeTheSeed, {}, "models.net.0.bias", 0, "seeded after __init__"),
    "step": (UnseededStep, {}, "models.net.0.weight", 1, "deterministic=True"),
    "rng": (Line, {"bad": SeedsFromTheClock()}, "rng.torch", 1, "from the clock"),
    "log": (LogsTheClock, {}, "metrics.jsonl.train/clock", 1, "is logged from a clock"),
    "state": (Line, {"bad": KeepsTheClock()}, "callbacks.bad.now", 1, "what a clock says"),
    "course": (Line, {"bad": StopsTheFirstTime()}, "fit()", 2, "decides when the run"),
}


@pytest.mark.parametrize("fault", STRAIGHT)
def test_two_straight_runs_that_differ_are_told_from_resume_faults(
    fault: str, tmp_path: Path
) -> None:
    kind, callbacks, path, step, cause = STRAIGHT[fault]
    report = verify(kind, tmp_path, callbacks=callbacks)
    assert not report.is_exact
    assert (report.difference.path, report.difference.step) == (path, step), report
    assert (report.kills, report.killed_at) == ((), None)
    assert_matches(cause, report.cause)
    assert "two straight runs differ" in str(report)
    assert report.difference.straight != report.difference.other


def test_what_differs_in_straight_runs_can_be_ignored(tmp_path: Path) -> None:
    report = verify(LogsTheClock, tmp_path, ignore=["metrics.jsonl.*clock", "no.such.*"])
    assert report.is_exact, report
    assert "ignore='no.such.*' fits no path" in report.notes


class Times(Callback):
    def pre_fit(self, trainer: Any) -> None:
        self.started = time.perf_counter()


def test_attributes_that_differ_in_straight_runs_are_not_compared(tmp_path: Path) -> None:
    report = verify(Line, tmp_path, callbacks={"times": Times()})
    assert report.is_exact, report
    assert "two straight runs differ in it (a clock?): callbacks.times.started" in str(report)


# ---------------------------------------------------------------------- a resumed run differs


class CountedData(UnseededData):
    is_counted = True


class RaisesTheRate(Callback):
    """Each step with a larger learning rate; forgets how many there were."""

    def __init__(self) -> None:
        self.count = 0

    def pre_optimizer_step(self, trainer: Any, optimizer: Any) -> None:
        self.count += 1
        optimizer.param_groups[0]["lr"] = 0.01 * self.count


class ForgetsHalf(RaisesTheRate):
    def __init__(self) -> None:
        super().__init__()
        self.name = "half"

    def state_dict(self) -> dict[str, Any]:
        return {"name": self.name}

    def load_state_dict(self, state: Any) -> None:
        self.name = state["name"]


class RemembersAll(RaisesTheRate):
    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: Any) -> None:
        self.count = state["count"]


class CountsInTheTrainer(Line):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._meter = Meter()

    def compute_loss(self, batch: Any, batch_idx: int) -> Any:
        self._meter.count += 1
        return super().compute_loss(batch, batch_idx) / self._meter.count


class Meter:
    def __init__(self) -> None:
        self.count = 0


class Counting(nn.Linear):
    count = 0

    def forward(self, input: Any) -> Any:
        self.count += 1
        return super().forward(input) / self.count


class CountsInAModule(Line):
    def configure_models(self) -> None:
        self.net = nn.Sequential(nn.Linear(3, 4), Counting(4, 1))


class CountsNothing(Line):
    """Keeps what nobody reads."""

    def compute_loss(self, batch: Any, batch_idx: int) -> Any:
        self.count = getattr(self, "count", 0) + 1
        return super().compute_loss(batch, batch_idx)


class DrawsOnFirstUse(Line):
    def compute_loss(self, batch: Any, batch_idx: int) -> Any:
        if self.local_batches == 0:
            self.table = float(torch.rand(())) * 0
        return super().compute_loss(batch, batch_idx)


COUNTED = [0]


class CountsOutside(Line):
    def compute_loss(self, batch: Any, batch_idx: int) -> Any:
        COUNTED[0] += 1
        return super().compute_loss(batch, batch_idx) / COUNTED[0]


class LoadsNothing(Callback):
    def __init__(self) -> None:
        self.box = SimpleNamespace(count=0)  # of a foreign class: it is not looked into

    def post_train_step(self, trainer: Any, result: Any, batch: Any, batch_idx: int) -> None:
        self.box.count += 1

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.box.count}

    def load_state_dict(self, state: Any) -> None:
        pass


class StopsByItsOwnCount(Callback):
    def post_train_step(self, trainer: Any, result: Any, batch: Any, batch_idx: int) -> None:
        if trainer.local_batches == 3:
            trainer.stop("enough")


class LogsItsOwnCount(Line):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("train/count", float(self.local_batches))
        return super().training_step(batch, batch_idx)


class FollowsTheProcess(Callback):
    def __init__(self) -> None:
        self.late = False

    def post_train_step(self, trainer: Any, result: Any, batch: Any, batch_idx: int) -> None:
        self.late = trainer.local_batches > 2


class NamesItselfAnew(Line):
    def __init__(self, config: Any) -> None:
        config = copy.copy(config)
        config.experiment = f"run-{secrets.token_hex(4)}"
        super().__init__(config)


RESUMED = {
    "data": (CountedData, {}, "batches.0.x", "keeps a position or generator.*dataset.count"),
    "callback": (
        Line,
        {"bad": RaisesTheRate()},
        "models.net.0.weight",
        "callback bad keeps count between steps; give it state_dict and load_state_dict",
    ),
    "half": (
        Line,
        {"bad": ForgetsHalf()},
        "models.net.0.weight",
        "callback bad keeps count between steps, which its state_dict and load_state_dict leave",
    ),
    "trainer": (CountsInTheTrainer, {}, "models.net.0.weight", "the trainer keeps _meter"),
    "module": (
        CountsInAModule,
        {},
        "models.net.0.weight",
        r"models.net.1 keeps count.*register_buffer\('count'",
    ),
    "idle": (CountsNothing, {}, "trainer.count", "the trainer keeps count"),
    "rng": (DrawsOnFirstUse, {}, "rng.torch", "first batch of a process"),
    "outside": (CountsOutside, {}, "models.net.0.weight", "a global variable"),
    "loads": (
        Line,
        {"bad": LoadsNothing()},
        "callbacks.bad.count",
        "load_state_dict of callback bad",
    ),
    "log": (LogsItsOwnCount, {}, "metrics.jsonl.train/count", "since the process started"),
    "derived": (
        Line,
        {"bad": FollowsTheProcess()},
        "callbacks.bad.late",
        "it is made from was not",
    ),
    "name": (NamesItselfAnew, {}, "fit()", "made anew in each process"),
}


@pytest.mark.parametrize("fault", RESUMED)
def test_a_run_that_does_not_resume_exactly_is_told_why(fault: str, tmp_path: Path) -> None:
    kind, callbacks, path, cause = RESUMED[fault]
    report = verify(kind, tmp_path, callbacks=callbacks)
    assert not report.is_exact
    assert report.difference.path == path, report
    assert report.difference.step == (2 if fault == "name" else 3)
    assert (report.kills, report.killed_at) == ((2,), "step 2")
    assert_matches(cause, report.cause)
    assert report.difference.straight != report.difference.other
    assert report.difference.in_state == (
        path.partition(".")[0] != "trainer" and fault != "derived"
    )


def test_a_run_that_ends_elsewhere_is_told_why(tmp_path: Path) -> None:
    report = verify(Line, tmp_path, callbacks={"bad": StopsByItsOwnCount()}, steps=4)
    assert not report.is_exact
    assert report.difference.path == "fit()"
    assert report.difference.straight == "is at the end of the run (step 3)"
    assert report.difference.other == "is at step 4"
    assert "trainer.stop()" in report.cause


def test_a_callback_that_was_restored_is_not_blamed_for_what_it_follows(tmp_path: Path) -> None:
    report = verify(CountsOutside, tmp_path, callbacks={"rate": RemembersAll()})
    assert not report.is_exact
    assert "a global variable" in report.cause


def test_an_attribute_that_nothing_follows_from_can_be_ignored(tmp_path: Path) -> None:
    report = verify(CountsNothing, tmp_path)
    assert not report.is_exact
    assert "agree to the end" in str(report)
    assert "ignore=['trainer.count']" in str(report)
    assert verify(CountsNothing, tmp_path, ignore=["trainer.count"]).is_exact


def test_a_report_reads_like_this(tmp_path: Path) -> None:
    report = verify(CountsNothing, tmp_path)
    assert str(report).splitlines()[:5] == [
        "not exact: killed after step 2 and resumed, it is another run",
        "first difference at step 3: trainer.count (an attribute)",
        "  straight: 3",
        "  resumed:  1",
        "likely cause: the trainer keeps count between steps, and its state does not; keep it in a "
        "callback",
    ]


def assert_matches(pattern: str, text: str) -> None:
    assert re.search(pattern, text), text


# ---------------------------------------------------------------------- runs that fail


class FailsInAStep(Line):
    def compute_loss(self, batch: Any, batch_idx: int) -> Any:
        raise ZeroDivisionError("in the user's step")


class LocalError(Exception):
    def __init__(self, one: int, two: int) -> None:  # it cannot be unpickled
        super().__init__(f"{one} and {two}")


class FailsOddly(Line):
    def compute_loss(self, batch: Any, batch_idx: int) -> Any:
        raise LocalError(1, 2)


class FailsToLoad(RaisesTheRate):
    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: Any) -> None:
        self.count = state["number"]


def test_an_exception_of_the_users_is_raised_as_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError, match="in the user's step") as raised:
        verify(FailsInAStep, tmp_path)
    assert "in compute_loss" in str(raised.value.__cause__)
    with pytest.raises(RuntimeError, match="LocalError: 1 and 2"):
        verify(FailsOddly, tmp_path)


def test_a_run_that_cannot_be_resumed_is_reported_with_its_traceback(tmp_path: Path) -> None:
    report = verify(Line, tmp_path, callbacks={"bad": FailsToLoad()})
    assert not report.is_exact
    assert report.difference.other == "KeyError: 'number'"
    assert "in load_state_dict" in report.traceback
    assert "in load_state_dict" in str(report)
    assert "do not fit each other" in report.cause


class Leaves(Line):
    def compute_loss(self, batch: Any, batch_idx: int) -> Any:
        print("out of memory, say")
        os._exit(3)


def test_a_process_that_dies_by_itself_is_an_error_with_its_last_output(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="exit code 3") as raised:
        verify(Leaves, tmp_path)
    assert "out of memory, say" in str(raised.value)


class Waits(Line):
    """Forever, with worker processes that wait as well; says who they are."""

    def configure_dataloaders(self) -> Any:
        loader, _ = super().configure_dataloaders()
        return DataLoader(loader.dataset, 4, num_workers=self.config.num_workers), None

    def compute_loss(self, batch: Any, batch_idx: int) -> Any:
        mine = psutil.Process()
        pids = [mine.pid, *(child.pid for child in mine.children())]
        Path(self.config.folder, "pids").write_text(" ".join(map(str, pids)))
        if self.config.experiment.isdigit():
            os.kill(os.getppid(), int(self.config.experiment))
        threading.Event().wait()


def assert_gone(folder: Path, number: int) -> None:
    """That a run had so many processes and none lives on; dying takes a moment."""
    pids = [int(pid) for pid in (folder / "pids").read_text().split()]
    assert len(pids) == number
    deadline = time.monotonic() + 5
    for pid in pids:
        while is_alive(pid):
            assert time.monotonic() < deadline, f"pid {pid} lives on"
            os.sched_yield()


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_run_that_hangs_is_ended_and_its_workers_with_it(tmp_path: Path) -> None:
    config = line_config(tmp_path, num_workers=1)
    with pytest.raises(TimeoutError, match="had come to step 0"):
        verify_resume(Waits, config, tell=None, timeout_seconds=4)
    assert_gone(tmp_path, 2)


def test_an_interrupted_call_leaves_no_process(tmp_path: Path) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, interrupt)
    config = line_config(tmp_path, experiment=str(int(signal.SIGUSR1)), num_workers=1)
    try:
        with pytest.raises(KeyboardInterrupt):
            verify_resume(Waits, config, tell=None)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert_gone(tmp_path, 2)


def test_a_killed_call_leaves_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    config = line_config(tmp_path, experiment=str(int(signal.SIGKILL)))
    pid = os.fork()
    if pid == 0:
        verify_resume(Waits, config, tell=None)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert_gone(tmp_path, 1)


# ---------------------------------------------------------------------- refused


def test_only_one_process_is_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = line_config(tmp_path, devices=2)
    with pytest.raises(ConfigError, match=r"DeviceParameters.SINGLE_DEVICE\(\)"):
        verify_resume(Line, config, tell=None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="one of 2 processes"):
        verify_resume(Line, line_config(tmp_path), tell=None)


def test_a_trainer_must_use_the_configuration_that_it_is_given(tmp_path: Path) -> None:
    config = line_config(tmp_path)
    with pytest.raises(ConfigError, match="the trainer's root_dir is"):
        verify_resume(lambda _: Line(config), config, tell=None)
    with pytest.raises(ConfigError, match="returned a Linear"):
        verify_resume(lambda _: nn.Linear(1, 1), config, tell=None)  # type: ignore[arg-type, return-value]
    assert not (tmp_path / "runs").exists()


def test_steps_without_a_checkpoint_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no checkpoint was made in 2 steps"):
        verify(Line, tmp_path, steps=2, every=5)
    with pytest.raises(ConfigError, match="steps=0 is not") as raised:
        verify(Line, tmp_path, steps=0, every=True)
    assert len(raised.value.problems) == 1


# ---------------------------------------------------------------------- processes


@pytest.mark.slow
def test_a_trainer_that_can_be_imported_is_verified_in_new_interpreters(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "runs", every_n_steps=1, async_save=False)
    run = Runner(TinyTrainer, config, tmp_path, "spawn", 120).run(Place(2, 0, 2, in_epoch=True))
    assert run.failure is None
    assert [one.place.step for one in run.observations] == [0, 1, 2]
    assert [one.is_saved for one in run.observations] == [False, True, True]


def test_a_trainer_that_cannot_be_imported_is_refused_where_forks_do_not_work(
    tmp_path: Path,
) -> None:
    with pytest.raises(ConfigError, match="at the top of a module"):
        verify_resume(lambda c: Line(c), line_config(tmp_path), tell=None, start_method="spawn")


@pytest.mark.slow
def test_a_process_that_has_used_its_threads_can_verify() -> None:
    """GNU's OpenMP hangs in a fork of such a process."""
    code = (
        "import torch\n"
        "torch.set_num_threads(2)\n"
        "torch.randn(1_000_000).exp()\n"
        "from support import TinyTrainer, tiny_config\n"
        "from dream_trainer import verify_resume\n"
        "class Large(TinyTrainer):\n"
        "    def compute_loss(self, batch, batch_idx):\n"
        "        torch.randn(1_000_000).exp()\n"
        "        return super().compute_loss(batch, batch_idx)\n"
        "config, ignore = tiny_config('runs'), ['trainer.seen']\n"
        "print(verify_resume(Large, config, steps=1, ignore=ignore, timeout_seconds=60))\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "\nexact: 1 steps" in done.stdout
