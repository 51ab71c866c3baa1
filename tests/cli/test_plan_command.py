"""``plan`` on the command line: what it prints, and how it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import TinyTrainer

from dream_trainer import RunPlan
from dream_trainer.cli import DreamCLI

OPTIONS = ["--training_parameters.n_epochs", "2", "--device_parameters.dp_shard", "2"]


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as end:
        DreamCLI(TinyTrainer, ["plan", *words], prog="train.py {}")
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert "Traceback" not in said
    return said


def test_it_prints_a_table_and_keeps_the_plan(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    cli = DreamCLI(TinyTrainer, ["plan", "--ranks", "8", *OPTIONS])
    assert isinstance(cli.result, RunPlan)
    assert cli.trainer is None
    said = capsys.readouterr().out
    assert said.startswith("8 ranks on 1 node of 8: dp_replicate 4 x dp_shard 2, 32-true\n")
    assert "\x1b" not in said
    assert list(tmp_path.iterdir()) == []


def test_options_and_files_are_those_of_fit(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    Path("run.yaml").write_text("device_parameters:\n  dp_shard: 4\n  accelerator: cuda\n")
    words = ["plan", "--config", "run.yaml", "--ranks=64", "--ranks-per-node", "4", "--json"]
    DreamCLI(TinyTrainer, [*words, "--batch_size", "3", "--num_samples", "64", *OPTIONS[:2]])
    told = json.loads(capsys.readouterr().out)
    assert told["layout"]["sizes"] == {"dp_replicate": 16, "dp_shard": 4, "tp": 1}
    assert (told["layout"]["num_nodes"], told["train"]["batch_size"]) == (16, 3)


def test_help_lists_its_own_options_and_those_of_the_configuration(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as end:
        DreamCLI(TinyTrainer, ["plan", "--help"], prog="train.py {}")
    said = capsys.readouterr().out
    assert end.value.code == 0
    assert "--ranks_per_node" in said
    assert "--device_parameters.dp_shard" in said


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--ranks", "many"], "--ranks: invalid int value: 'many'"),
        ([], "--ranks: has no value and no default"),
        (["--ranks", "0"], "plan: 0 ranks, 8 on each node: both must be above 0"),
        (["--ranks", "8", "--rank_per_node", "4"], "there is no --rank_per_node"),
        (["--ranks", "3"], "cannot divide a world of 3 ranks"),
    ],
)
def test_a_mistake_is_a_short_message(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, *OPTIONS, *words)
    assert told in said
    assert len(said.splitlines()) <= 2


def test_several_mistakes_are_told_together(capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, "--ranks", "3", "--device_parameters.dp_shard", "2")
    assert "cannot divide a world of 3 ranks" in said
    assert "nothing ends the run" in said


def test_the_installed_command_plans_a_class_in_a_file(tmp_path: Path) -> None:
    Path("train.py").write_text("from support import TinyTrainer\nclass Mine(TinyTrainer): ...\n")
    tests = Path(__file__).resolve().parents[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tests), *sys.path])}
    program = [sys.executable, "-c", "from dream_trainer.cli import main; main()"]
    options = ["--ranks", "4096", "--num_samples", "4096", *OPTIONS]
    done = subprocess.run(
        [*program, "plan", "train.py:Mine", *options],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("4,096 ranks on 512 nodes of 8: dp_replicate 2048 x dp_shard 2")
    assert {path.name for path in tmp_path.iterdir()} <= {"train.py", "__pycache__"}
