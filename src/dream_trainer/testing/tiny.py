"""A trainer that runs in milliseconds and has all that a real one has."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset

from dream_trainer.configs import CheckpointParameters, DeviceParameters, TrainingParameters
from dream_trainer.trainer.default_callbacks import ON_SCREEN
from dream_trainer.trainer.dream import DreamTrainer
from dream_trainer.trainer.trainer_config import DreamTrainerConfig

Batch = Mapping[str, Tensor]
Trainer = TypeVar("Trainer", bound="TinyTrainer")

_PARTS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "training_parameters": (TrainingParameters, {"n_epochs": 2}),
    "checkpoint_parameters": (CheckpointParameters, {}),
    "device_parameters": (DeviceParameters, {"accelerator": "cpu"}),
}


@dataclass(kw_only=True)
class TinyConfig(DreamTrainerConfig):
    """The configuration of a `TinyTrainer`. It runs on the CPU and needs no name."""

    experiment: str | None = "tiny"
    device_parameters: DeviceParameters = field(
        default_factory=lambda: DeviceParameters(accelerator="cpu")
    )
    num_samples: int = 24
    """Samples to train on."""
    num_val_samples: int = 10
    """Samples to validate on."""
    batch_size: int = 4
    """Samples per batch on one rank."""
    dropout: float = 0.0
    """Share of features dropped, so that a step draws from torch's generator."""
    augment: bool = False
    """Whether samples draw noise from Python's, NumPy's and torch's generators."""
    num_workers: int = 0
    """Processes that load samples."""
    lr: float = 0.05
    """Learning rate of the first steps."""
    has_validation: bool = True
    """Whether there is a validation loader."""


class Points(Dataset[dict[str, Tensor]]):
    """Fixed points of a sine of a sum.

    Args:
        num_samples: number of points.
        augment: add noise from all three global generators to ``x``.
        seed: of the points.
    """

    def __init__(self, num_samples: int, augment: bool = False, seed: int = 5) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(num_samples, 3, generator=generator, dtype=torch.float64)
        self.y = self.x.sum(1, keepdim=True).sin()
        self.augment = augment

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """``x`` of shape (3,), ``y`` of shape (1,), and ``index``."""
        x = self.x[index]
        if self.augment:
            x = x + random.random() * torch.rand(3) * float(np.random.rand())
        dtype = torch.get_default_dtype()
        return {"x": x.to(dtype), "y": self.y[index].to(dtype), "index": torch.tensor(index)}


class TinyTrainer(DreamTrainer):
    """A model of 41 parameters, AdamW, a scheduler, 24 samples: six steps an epoch.

    Override what your test is about, ``configure_models`` or ``compute_loss`` for example.
    """

    config: TinyConfig

    def configure_models(self) -> None:
        self.net = nn.Sequential(
            nn.Linear(3, 8), nn.Tanh(), nn.Dropout(self.config.dropout), nn.Linear(8, 1)
        )

    def configure_optimizers(self) -> Optimizer:
        return torch.optim.AdamW(self.net.parameters(), lr=self.config.lr)

    def configure_schedulers(self) -> LRScheduler | None:
        (optimizer,) = self.named_optimizers().values()
        return torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.7)

    def configure_dataloaders(self) -> tuple[Any, Any]:
        config = self.config
        train = DataLoader(
            Points(config.num_samples, config.augment),
            batch_size=config.batch_size,
            num_workers=config.num_workers,
            shuffle=True,
        )
        if not config.has_validation:
            return train, None
        return train, DataLoader(Points(config.num_val_samples, seed=6), config.batch_size)

    def compute_loss(self, batch: Any, batch_idx: int) -> Any:
        return (self.net(batch["x"]) - batch["y"]).square().mean()


def tiny_config(root: Path | str, **options: Any) -> TinyConfig:
    """A configuration from the fields of `TinyConfig` and of its three parts, side by side.

    ``tiny_config(tmp_path, n_epochs=3, every_n_steps=1, dp_shard=2, dropout=0.1)``. There is no
    progress display and no summary unless ``callbacks`` names them.

    Args:
        root: the directory of runs, a temporary one.
        options: fields by name.
    """
    made: dict[str, Any] = {"root_dir": str(root)}
    for name, (kind, defaults) in _PARTS.items():
        known = {one.name for one in fields(kind)}
        own = {key: options.pop(key) for key in list(options) if key in known}
        if name not in options:
            made[name] = kind(**defaults | own)
    callbacks: dict[str, Any] = dict.fromkeys(ON_SCREEN) | dict(options.pop("callbacks", {}))
    return TinyConfig(**made | options, callbacks=callbacks)


def tiny_trainer(
    root: Path | str,
    kind: type[Trainer] = TinyTrainer,  # type: ignore[assignment]
    **options: Any,
) -> Trainer:
    """A trainer of a kind with `tiny_config`."""
    return kind(tiny_config(root, **options))
