"""Killed with SIGKILL at any moment and started again, a run ends with the same bits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import killable_run
import psutil
import pytest
from support import free_port, rank_environment, run_ranks

from dream_trainer.checkpointing import CheckpointStore
from dream_trainer.storage import Manifest

pytestmark = pytest.mark.faults

HERE = Path(__file__).parent
SOURCES = [str(HERE.parents[1] / "src"), str(HERE.parent)]
KILLED = -signal.SIGKILL
SECONDS = 60


def outcome(root: Path, experiment: str) -> tuple[str, bytes]:
    """Hash of weights and optimizer state, and the log."""
    directory = root / "default" / "default" / experiment
    return (root / f"{experiment}.digest").read_text(), (directory / "metrics.jsonl").read_bytes()


def assert_only_whole_checkpoints(root: Path, experiment: str) -> CheckpointStore:
    store = CheckpointStore(root / "default" / "default" / experiment / "checkpoints")
    for path in store.paths():
        Manifest.read(path).verify(path)
    return store


def in_fork(function: Callable[..., Any], *arguments: Any) -> int:
    """Exit code of a forked process; negative is the signal that ended it."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        signal.alarm(SECONDS)
        status = 1
        try:
            function(*arguments)
            status = 0
        finally:
            sys.stdout.flush()
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


MOMENTS = [
    "pre_fit:1",
    "post_optimizer_step:1",
    "post_train_step:4",
    "pre_train_step:7",
    "post_validation_step:2",
    "post_validation_epoch:2",
    "post_train_epoch:1",
    "post_epoch:1",
    "on_boundary:7",
    "post_fit:1",
    *(f"{name}:{n}" for name in ("before-files", "after-files") for n in (1, 4)),
    *(f"{name}:{n}" for name in ("after-manifest", "after-rename") for n in (1, 3, 8)),
    *(f"{name}:2" for name in ("before-delete", "after-delete", "before-log", "after-log")),
]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, bytes]:
    root = tmp_path_factory.mktemp("straight")
    assert in_fork(killable_run.run, root, "straight") == 0
    return outcome(root, "straight")


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at(moment: str, tmp_path: Path, straight: tuple[str, bytes]) -> None:
    assert in_fork(killable_run.run, tmp_path, "killed", 0, moment) == KILLED
    assert_only_whole_checkpoints(tmp_path, "killed")
    assert in_fork(killable_run.run, tmp_path, "killed") == 0
    assert outcome(tmp_path, "killed") == straight
    store = assert_only_whole_checkpoints(tmp_path, "killed")
    assert [path.name for path in store.directory.glob(".*")] == []


def test_killed_again_and_again(tmp_path: Path, straight: tuple[str, bytes]) -> None:
    moments = [
        "post_train_step:3",
        "after-files:2",
        "on_boundary:2",
        "after-cut:1",
        "after-rename:1",
    ]
    for moment in moments:
        assert in_fork(killable_run.run, tmp_path, "killed", 0, moment) == KILLED
    assert in_fork(killable_run.run, tmp_path, "killed") == 0
    assert outcome(tmp_path, "killed") == straight


# ---------------------------------------------------------------------- as a user starts it


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Start the script in a session of its own; nothing of it survives the test."""
    started: list[subprocess.Popen[bytes]] = []

    def call(*arguments: object, **environment: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, str(HERE / "killable_run.py"), *map(str, arguments)],
            env=os.environ
            | {"PYTHONPATH": os.pathsep.join(SOURCES), "OMP_NUM_THREADS": "1"}
            | environment,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield call
    for process in started:
        # The workers of a killed process notice within seconds; the next test does not wait.
        sessions = [p for p in psutil.process_iter() if _session(p.pid) == process.pid]
        for one in sessions:
            one.kill()
        process.wait(10)


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


def test_a_killed_process_with_workers_that_is_started_again(
    tmp_path: Path,
    straight: tuple[str, bytes],
    start: Callable[..., subprocess.Popen[bytes]],
) -> None:
    assert start(tmp_path, "killed", 2, "after-files:4").wait(SECONDS) == KILLED
    assert start(tmp_path, "killed", 2, "").wait(SECONDS) == 0
    assert outcome(tmp_path, "killed") == straight


@pytest.mark.distributed
def test_a_killed_rank_takes_the_others_with_it_and_all_are_started_again(
    tmp_path: Path, start: Callable[..., subprocess.Popen[bytes]]
) -> None:
    def rank(name: str) -> None:
        killable_run.run(tmp_path, name)

    port = free_port()
    processes = [
        start(tmp_path, "killed", 0, "after-files:3:0", **rank_environment(rank, 2, port))
        for rank in range(2)
    ]
    first, second = [process.wait(SECONDS) for process in processes]
    assert first == KILLED
    assert second not in (0, KILLED)  # it failed by itself, nobody had to kill it
    run_ranks(2, rank, "killed")
    run_ranks(2, rank, "straight")
    assert outcome(tmp_path, "killed") == outcome(tmp_path, "straight")
    assert_only_whole_checkpoints(tmp_path, "killed")


@pytest.mark.distributed
@pytest.mark.parametrize(
    "moment", ["post_optimizer_step:4:1", "after-files:2:1", "on_boundary:3:0"]
)
def test_one_rank_of_two_is_killed_at(moment: str, tmp_path: Path) -> None:
    def rank(name: str, at: str) -> None:
        killable_run.run(tmp_path, name, 0, at)

    run_ranks(2, rank, "straight", "")
    with pytest.raises(AssertionError, match="died with exit code -9"):
        run_ranks(2, rank, "killed", moment)
    run_ranks(2, rank, "killed", "")
    assert outcome(tmp_path, "killed") == outcome(tmp_path, "straight")
