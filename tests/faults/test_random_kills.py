"""Killed at instants drawn at random, inside saves above all, a run ends with the same bits.

Every draw depends on FAULTS_SEED and the number of the test alone.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from driver import KILLED, SECONDS, End, Job, assert_same_end, draw
from killable_run import CELLS, STEPS

PARTS = 12
Marks = Callable[..., list[int]]


def times(total: int, short: int) -> pytest.MarkDecorator:
    """So many kills; the normal tests make the first few of them."""
    numbers = [pytest.param(n, marks=[pytest.mark.faults] * (n >= short)) for n in range(total)]
    return pytest.mark.parametrize("number", numbers)


def some_job(root: Path, rng: random.Random) -> Job:
    return Job(root, "killed", rng.choice([*CELLS]), rng.choice([0, 0, 0, 2]))


@times(80, short=2)
def test_inside_a_save(
    number: int, tmp_path: Path, straight: Callable[..., End], marks: Marks
) -> None:
    rng = draw("in-save", number)
    job = some_job(tmp_path, rng)
    ends = [0, *marks("in-save", job.cell)]
    part = rng.randrange(len(ends) - 1)  # the parts of a save differ much in their calls
    kind = rng.choice(["in-save", "in-save", "stalled-save"])
    job.killed(f"{kind}:{rng.randint(ends[part] + 1, ends[part + 1])}")
    assert_same_end(job.finish(), straight(job.cell), job)


@pytest.mark.faults
@pytest.mark.timeout(600)
@pytest.mark.parametrize("part", range(PARTS))
def test_before_every_change_of_a_file(
    part: int, tmp_path: Path, straight: Callable[..., End], marks: Marks
) -> None:
    failures = []
    for number in range(part + 1, marks("file", "both")[-1], PARTS):
        job = Job(tmp_path, f"killed-{number}")
        try:
            job.killed(f"file:{number}")
            assert_same_end(job.finish(), straight("both"), job)
        except AssertionError as error:
            failures.append(f"file:{number}: {error}")
    assert not failures, "\n".join(failures)


@times(20, short=2)
def test_before_a_change_of_a_file(
    number: int, tmp_path: Path, straight: Callable[..., End], marks: Marks
) -> None:
    rng = draw("file", number)
    job = some_job(tmp_path, rng)
    job.killed(f"file:{rng.randrange(1, marks('file', job.cell)[-1])}")
    assert_same_end(job.finish(), straight(job.cell), job)


@times(20, short=1)
def test_inside_a_restore(
    number: int, tmp_path: Path, straight: Callable[..., End], marks: Marks
) -> None:
    rng = draw("in-restore", number)
    job = some_job(tmp_path, rng)
    count = marks("in-restore", job.cell, resumed=True)[-1]
    job.killed(f"step:{rng.randint(3, STEPS[job.cell])}")
    job.killed(f"in-restore:{rng.randint(1, count * 9 // 10)}")
    assert_same_end(job.finish(), straight(job.cell), job)


@times(30, short=1)
def test_from_outside_after_a_save_began(
    number: int, tmp_path: Path, straight: Callable[..., End]
) -> None:
    rng = draw("outside", number)
    job = some_job(tmp_path, rng)
    step, microseconds = rng.randrange(1, STEPS[job.cell]), rng.randrange(30_000)
    processes = job.start()
    await_save(job, step)
    time.sleep(microseconds / 1e6)
    processes.kill(0)
    assert processes.wait() == [KILLED]
    assert_same_end(job.finish(), straight(job.cell), job)


def await_save(job: Job, step: int) -> None:
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        if any((job.directory / "checkpoints").glob(f"*step-{step:08}*")):
            return
    raise AssertionError(f"{job}: no save of step {step}")


@times(20, short=0)
def test_from_outside_at_any_time(
    number: int, tmp_path: Path, straight: Callable[..., End]
) -> None:
    rng = draw("any time", number)
    job = some_job(tmp_path, rng)
    began = time.monotonic()
    Job(tmp_path, "timed", job.cell, job.workers).finish()
    seconds = time.monotonic() - began
    processes = job.start()
    time.sleep(rng.uniform(0, seconds))
    processes.kill(0)
    assert processes.wait() in ([KILLED], [0])  # 0: it was quicker this time
    assert_same_end(job.finish(), straight(job.cell), job)
