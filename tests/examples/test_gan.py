"""The GAN draws digits, and a kill between its two optimizers' steps changes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from example_runs import assert_resumes_exactly, one_run, run

from dream_trainer import export_checkpoint

SMALL = ("--seed", "0", "--width", "8")


@pytest.mark.slow
def test_a_run_killed_between_the_two_steps_of_a_batch_ends_like_one_that_was_not(
    tmp_path: Path,
) -> None:
    # In the second epoch of three; an odd step is one of the discriminator's.
    _, whole = assert_resumes_exactly(
        tmp_path,
        "gan/train.py",
        *SMALL,
        *("--training_parameters.n_epochs", "3", "--training_parameters.val_every_n_epochs", "1"),
        *("--training_parameters.train_steps_per_epoch", "8"),
        *("--checkpoint_parameters.every_n_steps", "3"),
        kill_at=25,
    )

    killed = one_run(tmp_path, "killed")
    pictures = [(directory / "samples.png").read_bytes() for directory in (whole, killed)]
    assert pictures[0].startswith(b"\x89PNG")
    assert pictures[0] == pictures[1]
    # The latents of the picture are weights like others: whoever has the file can draw it again.
    weights = torch.load(export_checkpoint(whole, tmp_path / "gan.pt"), weights_only=True)
    assert weights["generator"]["picture_latents"].shape == (96, 32)


@pytest.mark.slow
def test_the_generated_images_come_closer_to_the_real_ones(tmp_path: Path) -> None:
    run(
        tmp_path,
        "gan/train.py",
        *("fit", "--root_dir", "runs", "--experiment", "learns", *SMALL),
        *("--training_parameters.max_steps", "120"),
        *("--training_parameters.val_every_n_epochs", "null"),
        *("--training_parameters.val_every_n_steps", "20"),
    )

    log = (one_run(tmp_path, "learns") / "metrics.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in log.splitlines()]
    distances = [row["val/frechet"] for row in rows if "val/frechet" in row]
    assert len(distances) == 6
    assert distances[0] > 6
    assert distances[-1] < distances[0] / 2


def test_help_lists_the_options_of_the_gan(tmp_path: Path) -> None:
    output = run(tmp_path, "gan/train.py", "fit", "--help")

    for option in ("--latent_size", "--generator_lr", "--discriminator_lr", "--real_target"):
        assert option in output
    assert "Random numbers that a picture is made from" in output
