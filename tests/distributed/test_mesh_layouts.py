"""Every layout of the mesh trains like one device: FSDP2, HSDP, tensor parallel, their products."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import TinyTrainer, flat, run_ranks, tiny
from torch import Tensor, nn
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

pytestmark = [pytest.mark.distributed, pytest.mark.may_leave("rng")]

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "single": (1, {}),
    "fsdp": (2, {"dp_replicate": 1, "dp_shard": 2}),
    "tp": (2, {"dp_replicate": 1, "tensor_parallel": 2}),
    "hsdp": (4, {"dp_replicate": 2, "dp_shard": 2}),
    "fsdp x tp": (4, {"dp_replicate": 1, "dp_shard": 2, "tensor_parallel": 2}),
    "ddp x tp": (4, {"dp_replicate": 2, "tensor_parallel": 2}),
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(3)
        self.up = nn.Linear(3, 6)
        self.down = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).tanh())


class Net(nn.Module):
    """Parameters that are split, and parameters that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Trainer(TinyTrainer):
    def configure_models(self) -> None:
        self.net = Net()

    def apply_tensor_parallel(self, model: nn.Module, mesh: Any) -> None:
        for block in model.blocks:
            plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
            parallelize_module(block, mesh, plan)


def fit(root: Path, layout: str, kind: type[TinyTrainer] = Trainer, **options: Any) -> list[Any]:
    """Train with 8 samples a step; the weights that each rank ends with, and its mesh."""
    size, sizes = LAYOUTS[layout]
    dp_size = size // sizes.get("tensor_parallel", 1)

    def rank() -> Any:
        torch.set_default_dtype(torch.float64)
        made = {"batch_size": 4 // dp_size, "gradient_accumulation_steps": 2, "num_samples": 22}
        trainer = tiny(
            root,
            kind,
            experiment=layout.replace(" ", "-"),
            devices=size,
            **made | {"gradient_clip_val": 0.5} | sizes | options,
        )
        trainer.fit()
        mesh = trainer.world.mesh
        return flat(trainer.state_dict()["models"]), mesh and mesh.mesh_dim_names

    return run_ranks(size, rank)


def log(root: Path, layout: str) -> list[dict[str, float]]:
    path = root / "default" / "default" / layout.replace(" ", "-") / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def one_device(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    root = tmp_path_factory.mktemp("single")
    fit(root, "single")
    return log(root, "single")


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "single"])
def test_a_layout_trains_like_one_device(
    tmp_path: Path, layout: str, one_device: list[dict[str, float]]
) -> None:
    ranks = fit(tmp_path, layout)
    assert all(weights == ranks[0][0] for weights, _ in ranks)
    _, sizes = LAYOUTS[layout]
    names = {"dp_replicate": "dp_replicate", "dp_shard": "dp_shard", "tensor_parallel": "tp"}
    assert ranks[0][1] == tuple(names[name] for name in names if sizes.get(name, 1) > 1)
    rows = log(tmp_path, layout)
    assert [row.keys() for row in rows] == [row.keys() for row in one_device]
    for row, expected in zip(rows, one_device, strict=True):
        assert row == pytest.approx(expected, rel=1e-10)
    assert any("train/grad_norm" in row for row in rows)
