"""The digits example with an average of its weights: one training, validated in two ways."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from matplotlib import pyplot as plt
from pictures import example

from dream_trainer import EMA, CheckpointParameters, TrainingParameters
from dream_trainer.loggers import JsonlLog

digits = example("digits")


def curve(root: str, evaluate_with: str) -> list[tuple[int, float]]:
    """Steps and validation losses of a run whose rate stays high; both runs have equal weights."""

    class Trainer(digits.DigitsTrainer):
        def configure_schedulers(self):
            return None

    ema = EMA(0.98, warm_up=True, average_buffers=True, evaluate_with=evaluate_with)
    trainer = Trainer(
        digits.DigitsConfig(
            root_dir=root,
            seed=0,
            experiment=evaluate_with,
            training_parameters=TrainingParameters(n_epochs=15, val_every_n_steps=10),
            checkpoint_parameters=CheckpointParameters(every_n_epochs=None),
            callbacks={"ema": ema, "progress": None, "curves": None},
        )
    )
    trainer.fit()
    rows = JsonlLog(trainer.run_directory / "metrics.jsonl").read()
    return [(row["step"], row["val/loss"]) for row in rows if "val/loss" in row]


def main(folder: Path) -> None:
    """Write ``averages.png``."""
    torch.set_num_threads(1)
    figure, axes = plt.subplots(figsize=(7, 2.8), layout="constrained")
    with tempfile.TemporaryDirectory() as root:
        for evaluate_with, width in (("model", 1.0), ("average", 2.0)):
            points = curve(root, evaluate_with)
            label = "the model's own weights" if evaluate_with == "model" else "their average"
            axes.plot(*zip(*points, strict=True), label=label, linewidth=width)
    axes.set(xlabel="optimizer step", title="val/loss", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(folder / "averages.png", dpi=110)
    plt.close(figure)
