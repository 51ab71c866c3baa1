"""The digits example with three broken images; steps that meet one are skipped."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import torch
from matplotlib import pyplot as plt
from pictures import example

from dream_trainer import CheckpointParameters, TrainingParameters
from dream_trainer.loggers import JsonlLog

digits = example("digits")
BROKEN = (100, 500, 900)


class BrokenDigits(digits.DigitsTrainer):
    """Some images of the training data are NaN."""

    def configure_dataloaders(self):
        train, val = super().configure_dataloaders()
        for index in BROKEN:
            train.dataset.images[index] = math.nan
        return train, val


def main(folder: Path) -> None:
    """Write ``nonfinite.png``."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        trainer = BrokenDigits(
            digits.DigitsConfig(
                root_dir=root,
                training_parameters=TrainingParameters(
                    n_epochs=3, on_nonfinite="skip", gradient_clip_val=1.0
                ),
                checkpoint_parameters=CheckpointParameters(every_n_epochs=None),
                callbacks={"progress": None, "curves": None},
            )
        )
        trainer.fit()
        rows = JsonlLog(trainer.run_directory / "metrics.jsonl").read()
    losses = [(row["step"], float(row["train/loss"])) for row in rows if "train/loss" in row]
    skipped = [row["step"] for row in rows if "train/skipped_steps" in row]
    figure, axes = plt.subplots(figsize=(7, 2.8), layout="constrained")
    axes.plot(*zip(*[one for one in losses if math.isfinite(one[1])], strict=True), linewidth=1.2)
    for number, step in enumerate(skipped):
        label = "skipped step" if number == 0 else None
        axes.axvline(step, color="tab:red", linestyle=":", linewidth=1.2, label=label)
    axes.set(xlabel="optimizer step", title="train/loss", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(folder / "nonfinite.png", dpi=110)
    plt.close(figure)
