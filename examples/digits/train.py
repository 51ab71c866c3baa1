"""Handwritten digits: 1,797 real images, a small convolutional network, under a minute on a CPU.

    python examples/digits/train.py fit    # train, or go on where it was
    python examples/digits/train.py fit --device_parameters.devices 2
    python examples/digits/train.py predict --checkpoint best --output digits.pt
    python examples/digits/train.py export-model --checkpoint best --output digits.pt2
    python examples/digits/train.py fit --help

The run directory gets `curves.png` beside the metrics log and the checkpoints.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from dream_trainer import (
    Callback,
    CheckpointParameters,
    DreamCLI,
    DreamTrainer,
    DreamTrainerConfig,
    TrainingParameters,
)
from dream_trainer.loggers import JsonlLog


@dataclass(kw_only=True)
class DigitsConfig(DreamTrainerConfig):
    project: str = "digits"
    experiment: str | None = "cnn"
    training_parameters: TrainingParameters = field(
        default_factory=lambda: TrainingParameters(n_epochs=20, gradient_clip_val=1.0)
    )
    checkpoint_parameters: CheckpointParameters = field(
        default_factory=lambda: CheckpointParameters(
            every_n_steps=10, monitor="val/accuracy", mode="max"
        )
    )
    batch_size: int = 64
    """Images per batch on one rank."""
    lr: float = 4e-3
    """Highest learning rate."""
    dropout: float = 0.2
    """Share of features dropped before the classifier."""
    num_workers: int = 0
    """Processes that load images."""


class ShiftedDigits(Dataset[tuple[Tensor, Tensor]]):
    """Digits moved by up to a pixel in each direction, by numpy's global generator."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        down, right = np.random.randint(0, 3, size=2)
        padded = F.pad(self.images[index], (1, 1, 1, 1))
        return padded[:, down : down + 8, right : right + 8], self.labels[index]


class ConvNet(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(dropout),
        )
        self.classifier = nn.Linear(64 * 4 * 4, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images))


class Curves(Callback):
    """Draws loss and accuracy from the metrics log, and prints a hash of the weights."""

    def post_fit(self, trainer: DreamTrainer) -> None:
        digest = hashlib.sha256()
        for _, weight in sorted(trainer.state_dict()["models"]["model"].items()):
            whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
            digest.update(whole.cpu().numpy().tobytes())
        trainer.world.print(f"sha256 of the weights: {digest.hexdigest()}")
        if trainer.world.is_global_zero:
            draw(trainer)


def draw(trainer: DreamTrainer) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = JsonlLog(trainer.run_directory / "metrics.jsonl").read()
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for axes, name in ((left, "loss"), (right, "accuracy")):
        for phase, width in (("train", 1.0), ("val", 2.0)):
            points = [(r["step"], r[f"{phase}/{name}"]) for r in rows if f"{phase}/{name}" in r]
            axes.plot(*zip(*points, strict=True), label=phase, linewidth=width)
        axes.set(xlabel="optimizer step", title=name)
        axes.grid(alpha=0.3)
        axes.legend()
    left.set_yscale("log")
    right.set_ylim(0.8, 1.005)
    figure.savefig(trainer.run_directory / "curves.png", dpi=110)
    plt.close(figure)


class DigitsTrainer(DreamTrainer):
    config: DigitsConfig

    def __init__(self, config: DigitsConfig, **kwargs: object) -> None:
        config.callbacks.setdefault("curves", Curves())
        super().__init__(config, **kwargs)

    def configure_models(self) -> None:
        self.model = ConvNet(self.config.dropout)

    def configure_metrics(self) -> None:
        self.accuracy = MulticlassAccuracy(num_classes=10, average="micro")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), lr=self.config.lr, weight_decay=0.05)

    def configure_schedulers(self) -> torch.optim.lr_scheduler.LRScheduler:
        (optimizer,) = self.named_optimizers().values()
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.num_training_steps)

    def configure_dataloaders(self) -> tuple[DataLoader, DataLoader]:
        digits = load_digits()
        images = torch.tensor(digits.images / 16, dtype=torch.float32).unsqueeze(1)
        labels = torch.tensor(digits.target)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        val, train = order[:360], order[360:]
        options = {"batch_size": self.config.batch_size, "num_workers": self.config.num_workers}
        return (
            DataLoader(ShiftedDigits(images[train], labels[train]), shuffle=True, **options),
            DataLoader(TensorDataset(images[val], labels[val]), **options),
        )

    def predict_dataloader(self) -> DataLoader:
        return self.configure_dataloaders()[1]

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        odds = self.model(batch[0]).softmax(1)
        return {"digit": odds.argmax(1), "sure": odds.amax(1), "label": batch[1]}

    def export_example(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return batch[0]

    def compute_loss(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        logits = self.model(images)
        self.accuracy.update(logits, labels)
        return F.cross_entropy(logits, labels)


if __name__ == "__main__":
    DreamCLI(DigitsTrainer)
