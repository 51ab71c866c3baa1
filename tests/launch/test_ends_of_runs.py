"""How launched runs end: a lost rank is named, a scheduler's signal saves, and nobody is left."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from launched import (
    BIN,
    OPTIONS,
    SCRIPT,
    ends,
    only,
    run,
    run_forks,
    torchrun_variables,
    train_here,
)
from support import free_port

pytestmark = [
    pytest.mark.may_leave("rng"),
    pytest.mark.distributed,
    pytest.mark.timeout(900),  # several programs, each waited for by `finish`
]

PYTHON = [sys.executable, SCRIPT, *OPTIONS, "--seed", 3, "--experiment", "x"]
PYTHON += ["--device_parameters.devices", 2]


def test_a_rank_that_is_lost_under_fabrics_launcher_is_named_and_ends_all(tmp_path: Path) -> None:
    output = run(PYTHON, tmp_path, status=1, DIE="1:6")
    assert output.count("rank 1 failed first, in training_step, step 5") >= 1
    assert output.index("failed first") < output.index("Traceback")
    assert "RankFailedError" in output


@pytest.mark.faults
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_under_fabrics_launcher_saves_and_ends_with_143(
    tmp_path: Path,
    reference: dict[str, Any],
    rank: int,
) -> None:
    output = run(PYTHON, tmp_path, status=143, DIE=f"{rank}:6", DIE_OF="SIGTERM")
    assert "SIGTERM: stopping after this batch" in output
    assert "Traceback" not in output
    assert ends(tmp_path) == []
    run(PYTHON, tmp_path)
    assert only([end["digest"] for end in ends(tmp_path)]) == reference["digest"]


@pytest.mark.faults
def test_a_signal_to_torchrun_saves_and_the_run_goes_on(
    tmp_path: Path,
    reference: dict[str, Any],
) -> None:
    words = ["--nproc-per-node", 2, "--master-port", free_port()]
    command = [BIN / "torchrun", *words, SCRIPT, *OPTIONS, "--seed", 3, "--experiment", "x"]
    output = run(command, tmp_path, status=1, DIE="1:6", DIE_OF="SIGTERM", DIE_WITH="parent")
    assert "saved at step 6" in output
    again = partial(train_here, experiment="x")
    run_forks(again, tmp_path, folder=tmp_path, ranks=torchrun_variables(2))
    assert only([end["digest"] for end in ends(tmp_path)]) == reference["digest"]
