"""Meta-learning: inner loops with second-order gradients, and gradients in validation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from example_runs import assert_resumes_exactly, one_run, run


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_weights(tmp_path: Path) -> None:
    output, _ = assert_resumes_exactly(
        tmp_path,
        "maml/train.py",
        *("--n_tasks", "200", "--n_val_tasks", "100", "--training_parameters.n_epochs", "2"),
        *("--checkpoint_parameters.every_n_steps", "4"),
        kill_at=15,  # of 16, in the second epoch
    )

    assert "inner steps   query loss on new tasks" in output


@pytest.mark.slow
def test_five_inner_steps_learn_a_new_task_better_and_better(tmp_path: Path) -> None:
    run(
        tmp_path,
        "maml/train.py",
        *("fit", "--root_dir", "runs", "--seed", "1", "--n_val_tasks", "200"),
        *("--n_tasks", "3000", "--training_parameters.n_epochs", "4"),
    )

    log = (one_run(tmp_path, "sines") / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, log) if "val/loss" in row]
    assert rows[-1]["val/loss"] < 0.7 * rows[0]["val/loss"]
    # Without gradients in validation, no inner step would change anything.
    assert rows[-1]["val/loss"] < rows[-1]["val/after_1"] < rows[-1]["val/before"]


def test_help_shows_the_options_of_the_example(tmp_path: Path) -> None:
    output = run(tmp_path, "maml/train.py", "fit", "--help")

    for option in ("--inner_steps", "--val_inner_steps", "--inner_lr", "--first_order"):
        assert option in output
