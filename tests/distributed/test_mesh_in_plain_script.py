"""The script of the documentation that uses ``MeshStrategy`` alone, on one rank and on two."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support import run_ranks
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from dream_trainer.errors import ConfigError
from dream_trainer.world import DreamFabric, DreamWorld, MeshStrategy
from dream_trainer.world.blocks import shard_blocks
from dream_trainer.world.gradient_norm import total_norm

pytestmark = [pytest.mark.distributed, pytest.mark.may_leave("rng")]

PAGE = Path(__file__).resolve().parents[2] / "docs" / "scale" / "layouts.md"


def script() -> str:
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    (found,) = (block for block in blocks if "init_module(empty_init=True)" in block)
    return str(found)


def test_the_script_trains_on_two_ranks_as_on_one(tmp_path: Path) -> None:
    def rank(folder: str) -> Any:
        (tmp_path / folder).mkdir(exist_ok=True)
        os.chdir(tmp_path / folder)
        names: dict[str, Any] = {}
        exec(compile(script(), str(PAGE), "exec"), names)
        return names["losses"]

    ((alone),) = run_ranks(1, rank, "one")
    one, other = run_ranks(2, rank, "two")
    assert one == other == pytest.approx(alone, rel=1e-5)


def test_tensor_parallel_in_a_plain_script() -> None:
    def parallelize(module: nn.Module, strategy: MeshStrategy) -> nn.Module:
        plan = {"0": ColwiseParallel(), "1": RowwiseParallel()}
        parallelize_module(module, strategy.device_mesh["tp"], plan)
        shard_blocks(module, **strategy.fsdp_arguments)
        return module

    def rank() -> Any:
        strategy = MeshStrategy(tensor_parallel=2, parallelize=parallelize)
        fabric = DreamFabric(accelerator="cpu", devices=2, strategy=strategy)
        fabric.launch()
        model = fabric.setup(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)))
        return sum(p.to_local().numel() for p in model.parameters())

    assert run_ranks(2, rank) == [16, 16]  # of 30; the last bias is not split


def test_tensor_parallel_without_a_plan_is_refused() -> None:
    def rank() -> str:
        strategy = MeshStrategy(tensor_parallel=2)
        fabric = DreamFabric(accelerator="cpu", devices=2, strategy=strategy)
        fabric.launch()
        with pytest.raises(ConfigError) as caught:
            fabric.setup(nn.Linear(4, 4))
        return str(caught.value)

    for text in run_ranks(2, rank):
        assert text.startswith("MeshStrategy: tensor_parallel=2, but nothing says how to split")
        assert text.count("\n") == 1


@pytest.mark.may_leave("environment")
def test_what_the_environment_overrides_is_said_at_launch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LT_PRECISION", "64-true")
    monkeypatch.setenv("LT_DEVICES", "1")
    fabric = DreamFabric()
    world = DreamWorld.from_fabric(fabric)
    world.launch()
    world.launch()
    said = "the environment overrides the device settings: LT_DEVICES=1, LT_PRECISION=64-true"
    assert capsys.readouterr().out.count(said) == 1


def recomputed_and_sharded(module: nn.Module, strategy: MeshStrategy) -> nn.Module:
    assert isinstance(module, nn.Sequential)
    module[0] = checkpoint_wrapper(module[0])
    shard_blocks(module, **strategy.fsdp_arguments)
    return module


def step_of_an_optimizer_made_before() -> list[bool]:
    strategy = MeshStrategy(parallelize=recomputed_and_sharded)
    fabric = DreamFabric(accelerator="cpu", devices=1, strategy=strategy)
    fabric.launch()
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.1))
    before = [p.detach().clone() for p in model.parameters()]
    fabric.backward(model(torch.ones(2, 4)).sum())
    optimizer.step()
    return [bool((p != q).any()) for p, q in zip(model.parameters(), before, strict=True)]


def test_an_optimizer_made_before_follows_parameters_whose_names_change() -> None:
    assert run_ranks(1, step_of_an_optimizer_made_before) == [[True] * 4]


def norm_of_half_gradients() -> list[float]:
    fabric = DreamFabric(accelerator="cpu", devices=2, strategy=MeshStrategy())
    fabric.launch()
    mesh = fabric.strategy.device_mesh
    gradient = distribute_tensor(torch.full((4,), 300.0).half(), mesh, [Shard(0)])
    return [float(total_norm([gradient])), float(total_norm([gradient], float("inf")))]


def test_the_norm_of_half_gradients_does_not_overflow() -> None:
    assert run_ranks(2, norm_of_half_gradients) == [[pytest.approx(600.0, rel=1e-3), 300.0]] * 2
