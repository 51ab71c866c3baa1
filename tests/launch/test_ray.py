"""Ray Train schedules two workers; if one is killed, the run continues in the same directory."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from launched import SCRIPT, ends, only, run, run_forks, torchrun_variables, train_here

pytestmark = [
    pytest.mark.may_leave("rng"),
    pytest.mark.distributed,
    pytest.mark.ray,
    pytest.mark.timeout(400),
    pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed"),
]


@pytest.mark.parametrize(
    "die",
    [
        pytest.param("-1:-1", id="undisturbed"),
        pytest.param("1:6", id="killed", marks=pytest.mark.faults),
    ],
)
def test_two_workers_of_ray(die: str, tmp_path: Path) -> None:
    folder, straight = tmp_path / "ray", tmp_path / "straight"
    folder.mkdir()
    straight.mkdir()
    output = run(
        [sys.executable, SCRIPT.with_name("ray_script.py"), folder, die],
        tmp_path,
        seconds=300,
        RAY_AUTH_MODE="disabled",
        RAY_USAGE_STATS_ENABLED="0",
        RAY_TMPDIR="/tmp",  # its sockets' names have a limit
    )
    assert (folder / "died").exists() is (die == "1:6")
    found = ends(folder)
    assert [(e["rank"], e["local_rank"], e["size"]) for e in found] == [(0, 0, 2), (1, 1, 2)]
    assert only([e["environment"] for e in found]) == "RayEnvironment"
    assert only([e["resumed"] for e in found]) is (die == "1:6"), output
    (directory,) = (folder / "runs" / "default" / "default").iterdir()
    assert directory.name == only([e["experiment"] for e in found])
    run_forks(train_here, straight, folder=straight, ranks=torchrun_variables(2))
    assert {e["digest"] for e in found} == {e["digest"] for e in ends(straight)}
