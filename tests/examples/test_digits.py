"""The digits keep what their README says; tests/test_examples.py trains them whole."""

from __future__ import annotations

from pathlib import Path

import pytest
from example_runs import assert_resumes_exactly, run

SHORT = (
    *("--training_parameters.n_epochs", 2, "--training_parameters.train_steps_per_epoch", 8),
    *("--checkpoint_parameters.every_n_steps", 5),
)


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_weights_and_log(tmp_path: Path) -> None:
    output, directory = assert_resumes_exactly(tmp_path, "digits/train.py", *SHORT, kill_at=11)
    assert "sha256 of the weights" in output
    assert (directory / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_help_shows_its_own_options(tmp_path: Path) -> None:
    assert "Share of features dropped" in run(tmp_path, "digits/train.py", "fit", "--help")
