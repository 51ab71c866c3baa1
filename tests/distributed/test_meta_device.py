"""Models made on the meta device: the same values in every layout, and nothing left without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from support import TinyTrainer, differences, flat, run_ranks, tiny
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from dream_trainer.errors import ConfigError
from dream_trainer.world import DreamWorld, MeshStrategy

pytestmark = [pytest.mark.distributed, pytest.mark.may_leave("rng")]

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "single": (1, {}),
    "ddp": (2, {"dp_replicate": 2}),
    "fsdp": (2, {"dp_replicate": 1, "dp_shard": 2}),
    "tp": (2, {"dp_replicate": 1, "tensor_parallel": 2}),
    "hsdp": (4, {"dp_replicate": 2, "dp_shard": 2}),
    "fsdp x tp": (4, {"dp_replicate": 1, "dp_shard": 2, "tensor_parallel": 2}),
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(5)
        self.up = nn.Linear(5, 8)
        self.down = nn.Linear(8, 5)
        self.attention = nn.MultiheadAttention(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(self.up(self.norm(x)).tanh())
        return x + self.attention(x, x, x)[0]


class Net(nn.Module):
    """Sizes that two ranks cannot halve, tied weights, buffers of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 5, padding_idx=2)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.batch_norm = nn.BatchNorm1d(5)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.out = nn.Linear(7, 1)
        self.scale = nn.Parameter(torch.empty(3))
        self.register_buffer("angles", torch.empty(3), persistent=False)
        self.register_buffer("seen", torch.empty(1, dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding((x.sum(1) * 100).long().abs() % 7)
        for block in self.blocks:
            x = block(x)
        return self.out(self.head(self.batch_norm(x))) * self.scale.sum() * self.angles[1]


class Trainer(TinyTrainer):
    def configure_models(self) -> None:
        with torch.device("meta"):
            self.net = Net()

    def init_weights(self) -> None:
        net = self.net
        nn.init.trunc_normal_(net.blocks[0].up.weight, std=0.02)
        nn.init.orthogonal_(net.blocks[0].down.weight)
        nn.init.xavier_uniform_(net.blocks[1].up.weight)
        nn.init.kaiming_normal_(net.blocks[1].down.weight)
        net.blocks[1].up.bias.data.bernoulli_(0.5)
        with torch.no_grad():
            net.out.weight[:, 1:3] = 7.0
            net.out.weight[0].mul_(2)
            net.out.bias.copy_(torch.randn(1))
            net.scale.copy_(torch.rand_like(net.scale) + torch.arange(3))
            row = net.blocks[0].norm.weight[2:]
            row.normal_()
            row.add_(1)
        net.angles.copy_(torch.linspace(0.5, 1, 3))
        net.seen.zero_()

    def apply_tensor_parallel(self, model: nn.Module, mesh: Any) -> None:
        for block in model.blocks:
            parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


def made(root: Path, layout: str, kind: type[TinyTrainer] = Trainer, **options: Any) -> Any:
    size, sizes = LAYOUTS[layout]
    options = {"devices": size, "experiment": layout.replace(" ", "-")} | sizes | options
    return tiny(root, kind, **options)


def values(root: Path, layout: str) -> list[Any]:
    def rank() -> Any:
        trainer = made(root, layout, enable=False)
        trainer.prepare()
        net = trainer.named_models()["net"]
        assert net.head.weight is net.embedding.weight
        local = sum(
            (p.to_local() if isinstance(p, DTensor) else p).numel() for p in net.parameters()
        )
        state = flat(trainer.state_dict()["models"]) | flat(net.angles, "angles")
        return state, torch.rand(1).item(), local

    return run_ranks(LAYOUTS[layout][0], rank)


def test_every_layout_starts_with_the_values_of_one_device(tmp_path: Path) -> None:
    ((expected, stream, whole),) = values(tmp_path, "single")
    for layout in LAYOUTS:
        for state, after, held in values(tmp_path, layout):
            assert differences(expected, state) == [], layout
            assert after == stream  # drawing left the generator where it leaves it on one device
            if "fsdp" in layout:
                assert held < 0.65 * whole


@pytest.mark.parametrize("layout", ["fsdp", "tp"])
def test_it_trains_and_resumes_exactly(tmp_path: Path, layout: str) -> None:
    def rank(experiment: str, **options: Any) -> Any:
        torch.set_default_dtype(torch.float64)
        trainer = made(tmp_path, layout, experiment=experiment, batch_size=2, **options)
        trainer.fit()
        net = trainer.named_models()["net"]
        return flat(trainer.state_dict()["models"]) | flat(net.angles, "angles")

    straight = run_ranks(2, rank, "straight")
    run_ranks(2, lambda: rank("cut", max_steps=2))
    assert run_ranks(2, rank, "cut") == straight


class Forgetful(Trainer):
    """Writes some buffers and parameters only."""

    def init_weights(self) -> None:
        self.net.seen.zero_()


@pytest.mark.parametrize("layout", ["single", "ddp", "fsdp"])
def test_what_nobody_initialises_is_named(tmp_path: Path, layout: str) -> None:
    def rank() -> str:
        with pytest.raises(ConfigError) as caught:
            made(tmp_path, layout, Forgetful, enable=False).prepare()
        return str(caught.value)

    for text in run_ranks(LAYOUTS[layout][0], rank):
        assert text == (
            "init_weights:\n"
            "  - net.angles has memory, but nothing was ever written into it\n"
            "  - net.scale has memory, but nothing was ever written into it\n"
            "Write them in init_weights, or in a reset_parameters of their module."
        )


def test_a_plain_script_gets_the_values_of_one_device() -> None:
    def rank() -> Any:
        fabric = Fabric(accelerator="cpu", devices=2, strategy=MeshStrategy(dp_shard=2))
        fabric.launch()
        fabric.seed_everything(3 + fabric.global_rank, verbose=False)
        with fabric.init_module(empty_init=True):
            model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Embedding(5, 3, 1))
        model = fabric.setup(model)
        return flat(model.state_dict())

    def one_device() -> Any:
        torch.manual_seed(3)
        made = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Embedding(5, 3, 1))
        return flat(made.state_dict())

    (expected,) = run_ranks(1, one_device)
    assert run_ranks(2, rank) == [expected, expected]


def test_a_plain_script_is_told_what_no_layer_initialises() -> None:
    def rank() -> str:
        fabric = Fabric(accelerator="cpu", devices=2, strategy=MeshStrategy(dp_shard=2))
        fabric.launch()
        with fabric.init_module(empty_init=True):
            model = nn.Linear(3, 3)
            model.scale = nn.Parameter(torch.empty(1))
        with pytest.raises(ConfigError) as caught:
            fabric.setup(model)
        return str(caught.value)

    for text in run_ranks(2, rank):
        assert "init_weights: scale has memory, but nothing was ever written into it" in text


class Masked(nn.Module):
    """Has buffers of every kind, made in the constructor, where meta tensors have no values."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer("mask", torch.ones(3, 3, dtype=torch.bool).tril())
        self.register_buffer("rotations", torch.polar(torch.ones(3), torch.arange(3.0)))
        self.register_buffer("bytes", torch.ones(3, dtype=torch.uint8))
        self.register_buffer("small", torch.ones(3, dtype=torch.int8))


def test_buffers_of_any_type_that_nobody_writes_are_named() -> None:
    world = DreamWorld(fabric=Fabric(accelerator="cpu", devices=1))
    with torch.device("meta"):
        net = Masked()
    with pytest.raises(ConfigError) as caught:
        world.setup(net)
    assert [line.split()[0] for line in caught.value.problems] == [
        "bytes",
        "mask",
        "rotations",
        "small",
    ]
