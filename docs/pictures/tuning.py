"""The digits example: which learning rate, and which batch size."""

from __future__ import annotations

from pathlib import Path

import torch
from pictures import example

from dream_trainer import find_batch_size, find_learning_rate

digits = example("digits")


def main(folder: Path) -> None:
    """Write ``learning_rate.png`` and ``batch_size.png``."""
    torch.set_num_threads(1)
    rates = find_learning_rate(digits.DigitsTrainer, digits.DigitsConfig())
    rates.save(folder / "learning_rate.png")
    sizes = find_batch_size(
        digits.DigitsTrainer,
        digits.DigitsConfig(),
        mode="power",
        start=4,
        max_size=512,
        steps=20,
        tell=None,
    )
    sizes.save(folder / "batch_size.png")
    print(rates, sizes, sep="\n\n")
