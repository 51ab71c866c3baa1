"""Killed with SIGKILL at a named moment and started again, a run ends with the same bits."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from driver import KILLED, SECONDS, End, Job, assert_same_end
from support import free_port, rank_environment

HERE = Path(__file__).parent
SOURCES = [str(HERE.parents[1] / "src"), str(HERE.parent)]

MOMENTS = [
    "pre_fit:1",
    "post_train_step:4",
    "post_validation_step:2",
    "post_train_epoch:1",
    "on_boundary:7",
    "post_fit:1",
    "before-files:4",
    "after-files:1",
    "after-manifest:3",
    "after-rename:8",
    "before-delete:2",
    "before-log:2",
]
MORE = [
    "post_optimizer_step:1",
    "pre_train_step:7",
    "post_validation_epoch:2",
    "post_epoch:1",
    "before-files:1",
    "after-files:4",
    "after-manifest:1",
    "after-manifest:8",
    "after-rename:1",
    "after-rename:3",
    "after-delete:2",
    "after-log:2",
]


@pytest.mark.parametrize(
    "moment", [*MOMENTS, *(pytest.param(m, marks=pytest.mark.faults) for m in MORE)]
)
def test_killed_at(moment: str, tmp_path: Path, straight: Callable[..., End]) -> None:
    job = Job(tmp_path, "killed")
    job.killed(moment)
    assert_same_end(job.finish(), straight("both"), job)


def test_killed_again_and_again(tmp_path: Path, straight: Callable[..., End]) -> None:
    job = Job(tmp_path, "killed")
    for moment in (
        "post_train_step:3",
        "after-files:2",
        "on_boundary:2",
        "after-cut:1",
        "after-rename:1",
    ):
        job.killed(moment)
    assert_same_end(job.finish(), straight("both"), job)


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


@pytest.mark.faults
def test_a_killed_process_with_workers_that_is_started_again(
    tmp_path: Path,
    straight: Callable[..., End],
    start: Callable[..., subprocess.Popen[bytes]],
) -> None:
    job = Job(tmp_path, "killed", workers=2)
    assert start(tmp_path, "killed", "both", 2, "after-files:4").wait(SECONDS) == KILLED
    assert start(tmp_path, "killed", "both", 2, "").wait(SECONDS) == 0
    assert job.starts() == [0, 3]
    assert_same_end(job.end(), straight("both"), job)


@pytest.mark.faults
@pytest.mark.distributed
def test_a_killed_rank_takes_the_others_with_it_and_all_are_started_again(
    tmp_path: Path, straight: Callable[..., End], start: Callable[..., subprocess.Popen[bytes]]
) -> None:
    port = free_port()
    processes = [
        start(tmp_path, "killed", "both", 0, "after-files:3:0", **rank_environment(rank, 2, port))
        for rank in range(2)
    ]
    first, second = [process.wait(SECONDS) for process in processes]
    assert first == KILLED
    assert second not in (0, KILLED)  # it failed by itself, nobody had to kill it
    job = Job(tmp_path, "killed", ranks=2)
    assert_same_end(job.finish(), straight("both", 2), job)
