"""The layouts that tests run under, and a model that works in all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from support import TinyTrainer, tiny_config
from torch import Tensor, nn
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torchmetrics import SumMetric


@dataclass(frozen=True)
class Layout:
    """How many ranks, and what ``DeviceParameters`` says of them."""

    name: str
    size: int
    sizes: Mapping[str, int] = field(default_factory=dict)

    @property
    def dp_size(self) -> int:
        return self.size // self.sizes.get("tensor_parallel", 1)

    def options(self, samples_per_batch: int) -> dict[str, Any]:
        """Options of `support.tiny`, with so many samples a batch over all ranks."""
        sizes = {"dp_replicate": 1} | dict(self.sizes)
        return {"devices": self.size, "batch_size": samples_per_batch // self.dp_size, **sizes}


#: By name, as in the table of docs/scale/layouts.md.
LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout("single", 1),
        Layout("ddp", 2, {"dp_replicate": 2}),
        Layout("fsdp", 2, {"dp_shard": 2}),
        Layout("hsdp", 4, {"dp_replicate": 2, "dp_shard": 2}),
        Layout("tp", 2, {"tensor_parallel": 2}),
        Layout("fsdp-tp", 4, {"dp_shard": 2, "tensor_parallel": 2}),
    )
}


class Block(nn.Module):
    """A feed-forward block, residual, as in a transformer."""

    def __init__(self, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width, bias=False)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.down(nn.functional.gelu(self.up(self.norm(x)))))


class Blocks(nn.Module):
    """Three numbers in, one out, through blocks."""

    def __init__(self, width: int = 8, depth: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Linear(3, width)
        self.blocks = nn.ModuleList(Block(width, dropout) for _ in range(depth))
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def split_blocks(model: nn.Module, mesh: Any) -> None:
    """Tensor parallelism for every `Block` of a model."""
    for part in model.modules():
        if isinstance(part, Block):
            parallelize_module(part, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


class Rows:
    """A logger that keeps its rows in memory, on rank 0."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        self.rows.append({"step": step, **metrics})

    def finalize(self, status: str) -> None:
        pass


class BlocksTrainer(TinyTrainer):
    """`TinyTrainer` with `Blocks`, in any layout; samples count differently, a metric counts them.

    ``seen`` has the indices of this rank's samples, by step.
    """

    def __init__(self, config: Any, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        self.seen_by_step: dict[int, list[int]] = {}
        self.loggers["rows"] = self.logger = Rows()

    def configure_models(self) -> None:
        self.net: nn.Module = Blocks(dropout=self.config.dropout)

    def configure_metrics(self) -> None:
        self.index_sum = SumMetric()

    def apply_tensor_parallel(self, model: nn.Module, mesh: Any) -> None:
        split_blocks(model, mesh)

    def compute_loss(self, batch: Any, batch_idx: int) -> Any:
        self.index_sum.update(batch["index"])
        if torch.is_grad_enabled() and self.loop.train_loader.num_samples:
            self.seen_by_step.setdefault(self.global_step, []).extend(batch["index"].tolist())
        weight = 1 + batch["index"] % 5
        losses = (self.net(batch["x"]).to(batch["y"].dtype) - batch["y"]).square()[:, 0]
        return {"loss": (losses * weight).sum() / weight.sum(), "weight": weight.sum()}


def laid_out(
    root: Path | str,
    layout: Layout | str,
    kind: type[BlocksTrainer] = BlocksTrainer,
    *,
    samples_per_batch: int = 4,
    **options: Any,
) -> Any:
    """A trainer of a kind under a layout, with `support.tiny_config`; writes nothing by default."""
    laid = LAYOUTS[layout] if isinstance(layout, str) else layout
    defaults = {"enable": False, "experiment": laid.name, **laid.options(samples_per_batch)}
    return kind(tiny_config(root, **defaults | options))


def in_double() -> None:
    """Compute in float64 from here on, in a process of its own.

    Fabric refuses ``"64-true"`` for sharded strategies, but converts nothing under ``"32-true"``.
    """
    torch.set_default_dtype(torch.float64)
