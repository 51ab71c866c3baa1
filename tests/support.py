"""What tests share beside `dream_trainer.testing`."""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dream_trainer import testing
from dream_trainer.testing import (
    Points,
    RankError,
    RecordingCallback,
    TinyConfig,
    differences,
    exact_state,
    free_port,
    rank_environment,
    run_ranks,
    tiny_config,
)
from dream_trainer.testing import flat_state as flat

__all__ = [
    "Points",
    "RankError",
    "RecordingCallback",
    "TinyConfig",
    "TinyTrainer",
    "deep_copy",
    "differences",
    "digest",
    "exact_state",
    "flat",
    "free_port",
    "mlp",
    "rank_environment",
    "run_ranks",
    "tiny",
    "tiny_config",
    "weights",
]


def mlp(dropout: float = 0.0) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 1))


class TinyTrainer(testing.TinyTrainer):
    """Remembers which samples this process has seen, step by step."""

    def __init__(self, config: TinyConfig, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        self.seen: list[list[int]] = []

    def configure_models(self) -> None:
        self.net = mlp(self.config.dropout)

    def compute_loss(self, batch: Any, batch_idx: int) -> Any:
        if self.is_fitting and torch.is_grad_enabled():
            self.seen.append(batch["index"].tolist())
        return super().compute_loss(batch, batch_idx)


def tiny(root: Path | str, kind: type[Any] = TinyTrainer, **options: Any) -> Any:
    """A trainer of a kind with `tiny_config`."""
    return kind(tiny_config(root, **options))


def weights(trainer: Any) -> dict[str, Any]:
    return flat(trainer.state_dict()["models"])


def digest(trainer: Any) -> str:
    """A hash of weights and optimizer state."""
    state = trainer.state_dict()
    leaves = flat({"models": state["models"], "optimizers": state["optimizers"]})
    return hashlib.sha256(repr(sorted(leaves.items())).encode()).hexdigest()


def deep_copy(state: Any) -> Any:
    return copy.deepcopy(state)
