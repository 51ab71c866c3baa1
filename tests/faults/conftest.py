"""A failure says how to see it again."""

from __future__ import annotations

from collections.abc import Callable, Generator
from functools import cache
from typing import Any

import driver
import pytest


@pytest.fixture(scope="session")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., driver.End]:
    """How the runs of a cell end that nobody killed, by cell and number of ranks."""

    @cache
    def end(cell: str, ranks: int = 1) -> driver.End:
        return driver.Job(tmp_path_factory.mktemp("straight"), "straight", cell, 0, ranks).finish()

    return end


@pytest.fixture(scope="session")
def marks(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[int]]:
    """How often a moment is reached in a run, by cell, number of ranks, and rank.

    With ``resumed`` it is counted in the second half of a run that was killed.
    """

    @cache
    def count(
        moment: str, cell: str, ranks: int = 1, rank: int = 0, resumed: bool = False
    ) -> list[int]:
        job = driver.Job(tmp_path_factory.mktemp("counted"), "counted", cell, 0, ranks)
        if resumed:
            job.killed("step:3:*")
        job.finish(f"{moment}:0:*")
        return job.marks(rank)

    return count


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    report = yield
    if report.failed and hasattr(report.longrepr, "addsection"):
        seed = f"FAULTS_SEED={driver.SEED}"
        report.longrepr.addsection(
            "see it again", f"{seed} OMP_NUM_THREADS=1 python -m pytest -m '' '{item.nodeid}'"
        )
    return report
