"""The examples do what their first lines say, as real processes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def start(tmp_path: Path, script: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(EXAMPLES / script), "fit", "--root_dir", "runs", *arguments]
    return subprocess.Popen(
        command,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(tmp_path: Path, script: str, *arguments: str) -> str:
    process = start(tmp_path, script, *arguments)
    output, _ = process.communicate(timeout=150)
    assert process.returncode == 0, output
    return output


def weights_hash(output: str) -> str:
    match = re.search(r"sha256 of the weights: (\w{64})", output)
    assert match, output
    return match[1]


@pytest.mark.slow
def test_digits_passes_97_percent_and_a_killed_run_ends_with_the_same_weights(
    tmp_path: Path,
) -> None:
    short = ("--training_parameters.n_epochs", "5")
    straight = run(tmp_path, "digits/train.py", "--experiment", "a", *short)

    killed = start(tmp_path, "digits/train.py", "--experiment", "b", "--num_workers", "2", *short)
    assert killed.stdout is not None
    for line in killed.stdout:
        if line.startswith("epoch 2/"):
            killed.send_signal(signal.SIGKILL)
            break
    killed.communicate(timeout=60)
    resumed = run(tmp_path, "digits/train.py", "--experiment", "b", *short)

    assert "new run" in straight
    assert "resuming" in resumed
    assert weights_hash(resumed) == weights_hash(straight)
    runs = tmp_path / "runs" / "digits" / "default"
    log = (runs / "a" / "metrics.jsonl").read_bytes()
    assert (runs / "b" / "metrics.jsonl").read_bytes() == log
    rows = [json.loads(line) for line in log.splitlines()]
    assert rows[-1]["val/accuracy"] > 0.97
    assert (runs / "a" / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.faults  # other launches of real processes are in tests/launch
@pytest.mark.slow
@pytest.mark.distributed
def test_digits_trains_on_two_cpu_ranks(tmp_path: Path) -> None:
    output = run(
        tmp_path,
        "digits/train.py",
        *("--experiment", "two", "--device_parameters.devices", "2"),
        *("--device_parameters.accelerator", "cpu", "--training_parameters.n_epochs", "2"),
    )

    assert output.count("sha256 of the weights") == 1  # rank 1 is silent
    manifests = sorted((tmp_path / "runs").rglob("manifest.json"))
    assert json.loads(manifests[-1].read_text())["world_size"] == 2


@pytest.mark.slow
def test_char_gpt_counts_in_steps_and_prints_a_sample(tmp_path: Path) -> None:
    output = run(
        tmp_path,
        "char_gpt/train.py",
        *("--training_parameters.max_steps", "6", "--training_parameters.val_every_n_steps", "3"),
        *("--n_layers", "1", "--width", "32", "--context", "32", "--sample_length", "40"),
    )

    sample = output.partition("--- a sample\n")[2].partition("\n---")[0]
    assert len(sample) == 44
    assert "done at step 6" in output
    (log,) = (tmp_path / "runs").rglob("metrics.jsonl")
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 3, 4, 5, 6, 6]
