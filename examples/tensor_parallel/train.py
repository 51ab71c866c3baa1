r"""A transformer that learns to sort, its attention and MLP split over neighbouring ranks.

    python examples/tensor_parallel/train.py fit                 # one device
    python examples/tensor_parallel/train.py fit --device_parameters.devices 2 \
        --device_parameters.tensor_parallel 2 --device_parameters.accelerator cpu
    python examples/tensor_parallel/train.py validate            # on one device, what two wrote

The model sees a row of digits and then writes the same digits in order, one after another.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader, Dataset
from torchmetrics import MeanMetric

from dream_trainer import (
    CheckpointParameters,
    DreamCLI,
    DreamTrainer,
    DreamTrainerConfig,
    TrainingParameters,
)
from dream_trainer.errors import ConfigError

BASE = 10  # digits
SEPARATOR = BASE  # between what is given and what is to be written


@dataclass(kw_only=True)
class SortingConfig(DreamTrainerConfig):
    """The rows of digits, and the transformer that sorts them."""

    project: str = "tensor_parallel"
    experiment: str | None = "sorting"
    training_parameters: TrainingParameters = field(
        default_factory=lambda: TrainingParameters(n_epochs=5, gradient_clip_val=1.0)
    )
    checkpoint_parameters: CheckpointParameters = field(
        default_factory=lambda: CheckpointParameters(
            every_n_steps=50, monitor="val/sorted", mode="max"
        )
    )
    length: int = 12
    """Digits in a row."""
    n_rows: int = 4096
    """Rows in an epoch of training."""
    width: int = 64
    """Features per position."""
    n_heads: int = 4
    """Attention heads per block; a multiple of `tensor_parallel`."""
    n_layers: int = 2
    """Transformer blocks."""
    batch_size: int = 64
    """Rows per batch; ranks that share a block see the same ones."""
    lr: float = 4e-3
    """Highest learning rate."""

    def __post_init__(self) -> None:
        super().__post_init__()
        n_ranks, problems = self.device_parameters.tensor_parallel, []
        if isinstance(n_ranks, int) and self.n_heads % n_ranks:
            problems += [f"n_heads={self.n_heads} is not a multiple of the {n_ranks} ranks"]
        if self.width % self.n_heads:
            problems += [f"width={self.width} is not a multiple of {self.n_heads} heads"]
        if problems:
            raise ConfigError("sizes", problems)


class Rows(Dataset[tuple[Tensor, Tensor]]):
    """Rows of random digits, each a function of its index, and the digits in order."""

    def __init__(self, first: int, n_rows: int, length: int) -> None:
        self.first, self.n_rows, self.length = first, n_rows, length

    def __len__(self) -> int:
        return self.n_rows

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.first + index)
        digits = torch.randint(BASE, (self.length,), generator=generator)
        return digits, digits.sort().values


class Attention(nn.Module):
    """Causal attention whose number of heads is that of its own part of the features.

    Query, key and value are layers of their own: the first half of the outputs of each is then
    the first half of the heads, which one rank can have alone.
    """

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.width_of_head = width // n_heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (-1, self.width_of_head)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(attended.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, n_heads)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_1(x))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class Sorter(nn.Module):
    def __init__(self, config: SortingConfig) -> None:
        super().__init__()
        self.token = nn.Embedding(BASE + 1, config.width)
        self.position = nn.Embedding(2 * config.length, config.width)
        self.blocks = nn.ModuleList(
            Block(config.width, config.n_heads) for _ in range(config.n_layers)
        )
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, BASE)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class SortingTrainer(DreamTrainer):
    config: SortingConfig

    def configure_models(self) -> None:
        # No memory yet: each rank then gets that of its own parts of the layers alone.
        with torch.device("meta"):
            self.model = Sorter(self.config)

    def apply_tensor_parallel(self, model: nn.Module, mesh: DeviceMesh) -> None:
        """Split the layers of each block in pairs, so that ranks add up once for each pair.

        The first layers of a pair are split by outputs, and what follows them, heads and gelu,
        works on a part as on the whole. The last one is split by inputs, which are those parts.
        """
        for block in model.blocks:
            plan = {
                "attention.query": ColwiseParallel(),
                "attention.key": ColwiseParallel(),
                "attention.value": ColwiseParallel(),
                "attention.out": RowwiseParallel(),
                "up": ColwiseParallel(),
                "down": RowwiseParallel(),
            }
            parallelize_module(block, mesh, plan)

    def configure_metrics(self) -> None:
        self.sorted = MeanMetric()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), lr=self.config.lr, betas=(0.9, 0.95))

    def configure_schedulers(self) -> torch.optim.lr_scheduler.LRScheduler:
        (optimizer,) = self.named_optimizers().values()
        return torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.config.lr, total_steps=self.num_training_steps
        )

    def configure_dataloaders(self) -> tuple[DataLoader, DataLoader]:
        n_rows, length = self.config.n_rows, self.config.length
        train, val = Rows(0, n_rows, length), Rows(n_rows, 512, length)
        batch_size = self.config.batch_size
        return (
            DataLoader(train, batch_size=batch_size, shuffle=True),
            DataLoader(val, batch_size=batch_size),
        )

    def compute_loss(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        digits, ordered = batch
        separator = torch.full_like(digits[:, :1], SEPARATOR)
        tokens = torch.cat([digits, separator, ordered[:, :-1]], dim=1)
        logits = self.model(tokens)[:, -ordered.shape[1] :]
        self.sorted.update((logits.argmax(-1) == ordered).all(dim=1).float())
        return F.cross_entropy(logits.flatten(0, 1), ordered.flatten())


if __name__ == "__main__":
    DreamCLI(SortingTrainer)
