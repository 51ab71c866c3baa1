"""A run on two tensor-parallel ranks resumes to the bit, and one device reads what it wrote."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from example_runs import EXAMPLES, one_run, run

from dream_trainer import export_checkpoint

SCRIPT = "tensor_parallel/train.py"
SMALL = (
    *("--root_dir", "runs", "--length", "3", "--n_rows", "640", "--width", "32"),
    *("--n_layers", "1", "--training_parameters.n_epochs", "3", "--lr", "0.01"),
    *("--checkpoint_parameters.every_n_steps", "4", "--checkpoint_parameters.async_save", "false"),
)
TWO_RANKS = (
    *("--device_parameters.devices", "2", "--device_parameters.tensor_parallel", "2"),
    *("--device_parameters.accelerator", "cpu"),
)
# Starts the example; every rank of it, for each is started by this same line, dies at a step.
KILLED = """
import os, runpy, signal, sys
from torch.optim.optimizer import register_optimizer_step_post_hook

script, kill_at, num_steps = {script!r}, {kill_at}, 0

def count(*_):
    global num_steps
    num_steps += 1
    if num_steps == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)

register_optimizer_step_post_hook(count)
runpy.run_path(script, run_name="__main__")
"""


def run_ranks(folder: Path, experiment: str, kill_at: int = 0) -> str:
    """What the example prints on two ranks; with ``kill_at`` both get SIGKILL after that step."""
    script = EXAMPLES / SCRIPT
    if kill_at:
        killed = folder / "killed.py"
        killed.write_text(KILLED.format(script=str(script), kill_at=kill_at), encoding="utf-8")
        script = killed
    process = subprocess.run(
        [sys.executable, script, "fit", *SMALL, *TWO_RANKS, "--experiment", experiment],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    output = process.stdout + process.stderr
    assert process.returncode == (-signal.SIGKILL if kill_at else 0), output
    return output


@pytest.mark.slow
@pytest.mark.distributed
def test_two_killed_ranks_end_with_the_same_bits_and_one_device_reads_them(tmp_path: Path) -> None:
    run_ranks(tmp_path, "whole")
    run_ranks(tmp_path, "killed", kill_at=14)
    again = run_ranks(tmp_path, "killed")

    assert "resuming" in again
    whole, killed = (one_run(tmp_path, name) for name in ("whole", "killed"))
    log = (whole / "metrics.jsonl").read_bytes()
    assert (killed / "metrics.jsonl").read_bytes() == log
    first, second = (
        torch.load(export_checkpoint(one, tmp_path / f"{one.name}.pt"), weights_only=True)
        for one in (whole, killed)
    )
    assert list(first) == list(second)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first["blocks.0.up.weight"].shape == (128, 32)  # whole, though each rank had half

    rows = [json.loads(line) for line in log.splitlines()]
    losses = [row["val/loss"] for row in rows if "val/loss" in row]
    assert losses[-1] < 0.7 * losses[0]
    one_device = ("--experiment", "whole", "--device_parameters.devices", "1")
    results = run(tmp_path, SCRIPT, "validate", *SMALL, *one_device)
    values = dict(line.split() for line in results.splitlines() if line.startswith("val/"))
    assert float(values["val/loss"]) == pytest.approx(losses[-1], rel=1e-4)


def test_heads_that_do_not_divide_are_refused(tmp_path: Path) -> None:
    output = run(tmp_path, SCRIPT, "fit", *TWO_RANKS, "--n_heads", 1, "--width", 31, status=2)

    assert "n_heads=1 is not a multiple of the 2 ranks" in output


def test_help_names_the_options_of_the_example(tmp_path: Path) -> None:
    output = run(tmp_path, SCRIPT, "fit", "--help")

    for option in ("--length", "--n_rows", "--n_heads", "--lr"):
        assert f"  {option} " in output
