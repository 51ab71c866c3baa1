"""What saving every 20 steps costs a small GPT.

    python tests/benchmarks/bench_throughput.py [--rounds 5] [--steps 100]

Two runs in turn, each in this process, one thread of PyTorch: one saves behind the training, one
does not save. Compared are the medians of their times for the same steps.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rounds import Spread, Target, interleaved, per_round, report
from torch import Tensor, nn
from torch.nn import functional as F

from dream_trainer import (
    Callback,
    CheckpointParameters,
    DeviceParameters,
    DreamTrainer,
    DreamTrainerConfig,
    TrainingParameters,
)

VOCABULARY, CONTEXT, WIDTH, LAYERS = 256, 128, 256, 4
WARM_UP = 20


class GPT(nn.Module):
    """Four blocks, 3.3 million parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        block = nn.TransformerEncoderLayer(
            WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, LAYERS, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        embedded = self.tokens(tokens) + self.places.weight[:length]
        logits: Tensor = self.head(self.blocks(embedded, mask, is_causal=True))
        return logits


class Clock(Callback):
    """Seconds of the steps after the first ones."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._start = 0.0

    def post_train_step(self, trainer: Any, result: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == WARM_UP:
            self._start = time.perf_counter()
        self.seconds = time.perf_counter() - self._start


class Trainer(DreamTrainer):
    def configure_models(self) -> None:
        self.model = GPT()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters())

    def configure_dataloaders(self) -> Any:
        generator = torch.Generator().manual_seed(0)
        batch = torch.randint(VOCABULARY, (4, CONTEXT + 1), generator=generator)
        return [batch] * 10_000, None

    def compute_loss(self, batch: Tensor, batch_idx: int) -> Tensor:
        logits = self.model(batch[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def seconds_of_run(folder: Path, steps: int, every: int | None) -> float:
    clock = Clock()
    Trainer(
        DreamTrainerConfig(
            seed=1,
            root_dir=str(folder),
            device_parameters=DeviceParameters(accelerator="cpu", devices=1),
            training_parameters=TrainingParameters(max_steps=WARM_UP + steps),
            checkpoint_parameters=CheckpointParameters(every_n_steps=every, every_n_epochs=None),
            callbacks={"clock": clock, "progress": None},
        )
    ).fit()
    return clock.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="bench-throughput-") as name:
        run = functools.partial(seconds_of_run, Path(name), options.steps)
        times = interleaved(
            {"no saves": lambda: run(None), "a save every 20 steps": lambda: run(20)},
            options.rounds,
        )
    values = {way: Spread.of([options.steps / t for t in taken]) for way, taken in times.items()}
    for way, value in values.items():
        print(f"{way:24}{value} steps a second")
    kept = per_round(lambda a, b: a / b, times["no saves"], times["a save every 20 steps"])
    report(
        "throughput", values, [Target("throughput kept by saving every 20 steps", kept, 0.98, True)]
    )


if __name__ == "__main__":
    main()
