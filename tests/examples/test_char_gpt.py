"""The GPT on text keeps what its README says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from example_runs import assert_resumes_exactly, run

SMALL = (
    *("--n_layers", 1, "--width", 32, "--context", 32, "--sample_length", 10),
    *("--training_parameters.max_steps", 40, "--training_parameters.val_every_n_steps", 20),
    *("--checkpoint_parameters.every_n_steps", 7),
)


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_weights_and_log_and_has_learned(tmp_path: Path) -> None:
    _, directory = assert_resumes_exactly(tmp_path, "char_gpt/train.py", *SMALL, kill_at=25)
    text = (directory / "metrics.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert len(losses) == 40
    assert losses[-1] < losses[0] - 1


def test_help_shows_its_own_options(tmp_path: Path) -> None:
    output = run(tmp_path, "char_gpt/train.py", "fit", "--help")
    assert "Characters that the model sees." in output
    assert "--n_layers" in output
