"""Cross-validation that is killed in its second fold ends with the same folds and table."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest
import torch
from example_runs import run

from dream_trainer import export_checkpoint

SCRIPT = "k_fold/train.py"
# 379 rows to train on: 12 steps an epoch, 36 a fold.
SHORT = ("--n_folds", 3, "--training_parameters.n_epochs", 3)
IN_THE_SECOND_FOLD = 36 + 12 + 6


def folds(folder: Path, group: str, kill_at: int = 0) -> tuple[str, list[Path]]:
    """What a cross-validation prints, and the run directories that it has made."""
    place = ("--root_dir", "runs", "--group", group)
    saves = ("--checkpoint_parameters.every_n_steps", 5)
    output = run(folder, SCRIPT, "folds", *SHORT, *place, *saves, kill_at=kill_at)
    return output, sorted((folder / "runs" / "k_fold" / group).iterdir())


def table(output: str) -> dict[str, list[float]]:
    lines = [line.rsplit(maxsplit=3) for line in output.splitlines()[-5:]]
    return {title: [float(cell) for cell in cells] for title, *cells in lines}


def same_weights(run: Path, other: Path, folder: Path) -> bool:
    files = [
        export_checkpoint(one, folder / f"{one.parent.name}-{one.name}.pt") for one in (run, other)
    ]
    first, second = (torch.load(file, weights_only=True) for file in files)
    return list(first) == list(second) and all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.slow
def test_folds_that_were_killed_end_with_the_same_bits_and_the_same_table(tmp_path: Path) -> None:
    output, whole = folds(tmp_path, "whole")
    _, begun = folds(tmp_path, "killed", kill_at=IN_THE_SECOND_FOLD)
    again, killed = folds(tmp_path, "killed")

    assert [one.name for one in begun] == ["fold0", "fold1"]
    assert "resuming runs/k_fold/killed/fold0 at step 36, after 3 epochs" in again
    assert "resuming runs/k_fold/killed/fold1 at step" in again
    assert "new run in runs/k_fold/killed/fold2" in again
    assert [one.name for one in killed] == ["fold0", "fold1", "fold2"]
    for one, other in zip(whole, killed, strict=True):
        assert (one / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
        assert same_weights(one, other, tmp_path)
    assert table(again) == table(output)

    rows = table(output)
    assert list(rows) == ["fold 0", "fold 1", "fold 2", "mean", "std"]
    for column in range(3):
        values = [rows[f"fold {i}"][column] for i in range(3)]
        assert rows["mean"][column] == pytest.approx(statistics.mean(values), abs=1e-4)
        assert rows["std"][column] == pytest.approx(statistics.stdev(values), abs=1e-4)
    assert rows["mean"][1] > 0.93  # six in ten would be no skill
    for one in whole:
        steps = [json.loads(line) for line in (one / "metrics.jsonl").read_text().splitlines()]
        losses = [row["val/loss"] for row in steps if "val/loss" in row]
        assert losses[-1] < losses[0]


def test_one_fold_is_trained_alone_and_another_table_has_other_classes(tmp_path: Path) -> None:
    short = ("--training_parameters.n_epochs", 2, "--root_dir", "runs")
    output = run(tmp_path, SCRIPT, "fit", "--table", "wine", "--fold", 2, *short)
    refused = run(tmp_path, SCRIPT, "fit", "--fold", 5, status=2)

    assert "done at step 10, after 2 epochs: runs/k_fold/default/fold2" in output
    assert "5 is none of 5 folds, from 0" in refused


def test_help_names_the_options_of_the_example(tmp_path: Path) -> None:
    commands = run(tmp_path, SCRIPT, "--help")
    options = run(tmp_path, SCRIPT, "folds", "--help")

    assert "train and validate every fold" in commands
    for option in ("--table", "--n_folds", "--split_seed", "--width"):
        assert f"  {option} " in options
