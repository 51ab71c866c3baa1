"""Pictures of docs/use_it_after.md: what the digits example predicts, from its best checkpoint."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from pictures import example

from dream_trainer import PredictionWriter, read_predictions

digits = example("digits")


def main(folder: Path) -> None:
    """Train the example, predict, and draw the digits of which the model is least sure.

    Args:
        folder: gets ``predicted_digits.png``.
    """
    with tempfile.TemporaryDirectory() as place:
        writer = PredictionWriter(Path(place, "predictions"))
        callbacks = {"progress": None, "predictions": writer, "curves": None}
        config = digits.DigitsConfig(root_dir=place, callbacks=callbacks)
        config.training_parameters.n_epochs = 3
        trainer = digits.DigitsTrainer(config)
        trainer.fit()
        trainer.predict(checkpoint="best", return_predictions=False)
        predicted = read_predictions(writer.folder).together()
    images = [image for image, _ in trainer.predict_dataloader().dataset]
    draw(images, predicted, folder / "predicted_digits.png")


def draw(images: list[Any], predicted: dict[str, Any], path: Path) -> None:
    """A grid: every wrong digit, then those that were nearly wrong."""
    wrong = predicted["digit"] != predicted["label"]
    order = (predicted["sure"] - wrong.float()).argsort()[:24].tolist()
    figure, grid = plt.subplots(3, 8, figsize=(9, 4.2), layout="constrained")
    for axes, index in zip(grid.flat, order, strict=True):
        axes.imshow(images[index][0], cmap="gray_r")
        digit, label = int(predicted["digit"][index]), int(predicted["label"][index])
        is_wrong = digit != label
        title = f"{digit}, {predicted['sure'][index]:.0%}" + (f" (is {label})" if is_wrong else "")
        axes.set_title(title, fontsize=9, color="#c0392b" if is_wrong else "#2c3e50")
        axes.axis("off")
    figure.suptitle(
        f"{len(images)} validation digits, {int(wrong.sum())} wrong; the 24 least certain",
        fontsize=10,
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)
