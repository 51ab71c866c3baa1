"""The script of the documentation that uses ``MeshStrategy`` alone, on one rank and on two."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
from support import run_ranks
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from dream_trainer.errors import ConfigError
from dream_trainer.world import DreamFabric, DreamWorld, MeshStrategy
from dream_trainer.world.blocks import shard_blocks

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
