"""Reinforcement learning: rollouts as batches, many optimizer steps on each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from example_runs import assert_resumes_exactly, one_run, run

pytest.importorskip("gymnasium", reason="pip install gymnasium")


@pytest.mark.slow
def test_a_run_killed_inside_a_rollout_ends_with_the_same_weights(tmp_path: Path) -> None:
    # 4 environments, 100 steps, twice over in minibatches of 100: 8 steps a rollout, 24 an epoch.
    small = ("--n_environments", "4", "--rollout_steps", "100", "--minibatch_size", "100")
    _, whole = assert_resumes_exactly(
        tmp_path,
        "ppo/train.py",
        *(*small, "--passes", "2", "--rollouts_per_epoch", "3", "--val_episodes", "2"),
        *("--training_parameters.n_epochs", "2", "--checkpoint_parameters.every_n_steps", "8"),
        kill_at=36,
    )

    rows = map(json.loads, (whole / "metrics.jsonl").read_text().splitlines())
    assert [row["step"] for row in rows if "train/loss" in row][-3:] == [32, 40, 48]


@pytest.mark.slow
def test_the_pole_stays_up_longer(tmp_path: Path) -> None:
    run(
        tmp_path,
        "ppo/train.py",
        *("fit", "--root_dir", "runs", "--seed", "1", "--val_episodes", "5"),
        *("--training_parameters.n_epochs", "2"),
    )

    log = (one_run(tmp_path, "cartpole") / "metrics.jsonl").read_text().splitlines()
    rows = list(map(json.loads, log))
    by_chance = next(row["train/return"] for row in rows if "train/return" in row)
    learned = next(row["val/return"] for row in reversed(rows) if "val/return" in row)
    assert by_chance < 40  # the weights of the first rollout are not trained
    assert learned > 200


def test_help_shows_the_options_of_the_example(tmp_path: Path) -> None:
    output = run(tmp_path, "ppo/train.py", "fit", "--help")

    for option in ("--n_environments", "--rollout_steps", "--gae_lambda", "--entropy_weight"):
        assert option in output
