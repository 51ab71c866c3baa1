"""Every way to start a run gives it the ranks, the name and the device settings it should have."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from launched import BIN, OPTIONS, SCRIPT, ends, only, run
from support import free_port

pytestmark = [
    pytest.mark.may_leave("rng"),
    pytest.mark.distributed,
    pytest.mark.timeout(900),  # several programs, each waited for by `finish`
]


def assert_one_run(folder: Path, size: int, output: str = "") -> list[dict[str, Any]]:
    """All ranks ended, of one run in one directory, and rank 0 alone said so."""
    found = ends(folder)
    assert [end["rank"] for end in found] == list(range(size))
    assert {end["size"] for end in found} == {size}
    assert only([(e["experiment"], e["seed"], e["step"], e["digest"]) for e in found])[2] == 8
    directories = sorted((folder / "runs" / "default" / "default").iterdir())
    assert [path.name for path in directories] == [found[0]["experiment"]]
    if output:
        assert (output.count("new run in"), output.count("done at step 8")) == (1, 1), output
    return found


# ---------------------------------------------------------------------- python train.py


@pytest.mark.parametrize(
    "how",
    [
        pytest.param([SCRIPT], id="script"),
        pytest.param(["-m", SCRIPT.stem], id="module", marks=pytest.mark.faults),
    ],
)
def test_python_alone_starts_the_other_ranks(how: list[Any], tmp_path: Path) -> None:
    output = run([sys.executable, *how, *OPTIONS, "--device_parameters.devices", 2], tmp_path)
    found = assert_one_run(tmp_path, 2, output)
    assert only([end["environment"] for end in found]) == "LightningEnvironment"
    assert [end["local_rank"] for end in found] == [0, 1]


# ---------------------------------------------------------------------- torchrun, fabric run


def test_a_worker_killed_under_torchrun_changes_nothing(
    tmp_path: Path, reference: dict[str, Any]
) -> None:
    """By default torchrun gives every job the same id, so the run's name is the agents' to keep."""
    words = ["--nproc-per-node", 2, "--max-restarts", 3, "--master-port", free_port()]
    command = [BIN / "torchrun", *words, SCRIPT, *OPTIONS, "--seed", 3]
    output = run(command, tmp_path, DIE="1:6")
    assert (tmp_path / "died").exists()
    found = assert_one_run(tmp_path, 2)
    assert only([end["resumed"] for end in found]), output
    assert only([end["digest"] for end in found]) == reference["digest"]


def test_runs_one_after_another_under_torchrun_have_names_and_groups_of_their_own(
    tmp_path: Path,
) -> None:
    """A rank that is ahead would meet rank 0's last group; one that is open is left open."""
    words = ["--nproc-per-node", 2, "--master-port", free_port()]
    command = [BIN / "torchrun", *words, SCRIPT.with_name("several.py")]
    output, again = run(command, tmp_path), run(command, tmp_path)
    names = [line.split()[1:] for line in (output + again).splitlines() if "names" in line]
    assert [len(set(some)) for some in names] == [4, 4]
    directories = (tmp_path / "runs" / "default" / "default").iterdir()
    assert {path.name for path in directories} == {*names[0], *names[1]}


def test_torchrun_starts_a_trainer_that_has_no_script(tmp_path: Path) -> None:
    words = ["--nproc-per-node", 2, "--master-port", free_port(), "-m", "dream_trainer", "fit"]
    output = run([BIN / "torchrun", *words, "train:Trainer", *OPTIONS[1:]], tmp_path)
    assert_one_run(tmp_path, 2, output)


def test_fabric_run_decides_what_the_configuration_leaves_open(tmp_path: Path) -> None:
    words = ["--accelerator", "cpu", "--devices", 2, "--strategy", "ddp", "--precision"]
    port = ["--main-port", free_port()]
    command = [BIN / "fabric", "run", *words, "bf16-mixed", *port, SCRIPT, *OPTIONS]
    output = run(command, tmp_path)
    found = assert_one_run(tmp_path, 2, output)
    assert only([end["precision"] for end in found]) == "bf16-mixed"
    said = "fabric run overrides the device settings: LT_ACCELERATOR=cpu, LT_STRATEGY=ddp, "
    assert output.count(said) == 1
