"""A model of transformers resumes to the bit, learns, and ends as a folder of transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from example_runs import assert_resumes_exactly, run

from dream_trainer import export_checkpoint

transformers = pytest.importorskip("transformers", reason="pip install transformers")

SCRIPT = "hf_transformers/train.py"
SMALL = (
    *("--model.n_embd", 32, "--model.n_layer", 1, "--model.n_positions", 32, "--batch_size", 8),
    *("--training_parameters.train_steps_per_epoch", 20, "--training_parameters.max_steps", 50),
    *("--training_parameters.val_every_n_steps", 25, "--training_parameters.val_steps_per_epoch"),
    *(2, "--checkpoint_parameters.every_n_steps", 6),
)


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bits_and_transformers_reads_them(tmp_path: Path) -> None:
    output, whole = assert_resumes_exactly(tmp_path, SCRIPT, *SMALL, kill_at=33)

    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert losses[-1] < losses[0] - 0.5
    sample = output.partition("--- a sample\n")[2].partition("\n---")[0]
    assert len(sample) == 32
    folder = whole / "pretrained"
    transformers.utils.logging.disable_progress_bar()  # tqdm would leave a thread here
    read = transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()
    file = export_checkpoint(whole, tmp_path / "again.pt")
    weights = torch.load(file, weights_only=True)
    assert read.keys() == weights.keys()
    assert all(torch.equal(read[name], weights[name]) for name in weights)

    continued = ("--experiment", "more", "--checkpoint_parameters.init_from", folder)
    output = run(tmp_path, SCRIPT, "fit", "--root_dir", "runs", *SMALL, *continued)
    (log,) = (tmp_path / "runs").glob("*/*/more/metrics.jsonl")
    first = json.loads(log.read_text().splitlines()[0])
    assert first["train/loss"] < losses[0] - 0.5


def test_help_names_the_options_of_the_example(tmp_path: Path) -> None:
    output = run(tmp_path, SCRIPT, "fit", "--help")

    for option in ("--model.n_embd", "--model.n_layer", "--batch_size", "--lr"):
        assert f"  {option} " in output
