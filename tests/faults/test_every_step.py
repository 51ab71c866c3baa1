"""Killed after any of its optimizer steps, a run of any kind ends with the same bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from driver import End, Job, assert_same_end
from killable_run import CELLS, STEPS

# The whole job dies, ranks and loader workers; one rank alone is in test_killed_ranks.py.
MATRIX = [(cell, workers, ranks) for ranks in (1, 2) for workers in (0, 2) for cell in CELLS]
SHORT = [("both", 2, 1), ("both", 0, 2)]


def cases(short: list[tuple[str, int, int]]) -> list[object]:
    ranks_mark = {1: [], 2: [pytest.mark.distributed]}
    return [
        pytest.param(
            *case,
            id=f"{case[0]}-{case[1]} workers-{case[2]} ranks",
            marks=[*ranks_mark[case[2]], *([] if case in short else [pytest.mark.faults])],
        )
        for case in MATRIX
    ]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("cell", "workers", "ranks"), cases([]))
def test_killed_after_each_step_a_run_each(
    cell: str, workers: int, ranks: int, tmp_path: Path, straight: Callable[..., End]
) -> None:
    for step in range(1, STEPS[cell] + 1):
        job = Job(tmp_path, f"killed-{step}", cell, workers, ranks)
        job.killed(f"step:{step}:*")
        assert_same_end(job.finish(), straight(cell, ranks), job)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("cell", "workers", "ranks"), cases(SHORT))
def test_killed_after_each_step_one_run(
    cell: str, workers: int, ranks: int, tmp_path: Path, straight: Callable[..., End]
) -> None:
    job = Job(tmp_path, "killed", cell, workers, ranks)
    for step in range(1, STEPS[cell] + 1):
        job.killed(f"step:{step}:*")
    # Otherwise it would show no more than that a run can be repeated from its start.
    assert job.starts()[-1] >= STEPS[cell] - 3
    assert_same_end(job.finish(), straight(cell, ranks), job)
