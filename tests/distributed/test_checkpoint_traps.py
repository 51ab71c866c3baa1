"""Traps 14 and 15 of Fabric in every layout: what a checkpoint loads into, and what it says."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import LAYOUTS, Blocks, BlocksTrainer, laid_out
from lightning.fabric import Fabric
from lightning.fabric.strategies import ModelParallelStrategy
from support import differences, flat, run_ranks
from torch import nn
from torch.distributed.fsdp import fully_shard

from dream_trainer.errors import StateError

pytestmark = [pytest.mark.distributed, pytest.mark.may_leave("rng")]


class Plain(BlocksTrainer):
    """Plain SGD, which has no state for any parameter."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), lr=0.01)


class Renamed(Plain):
    """A part has another name, another one another shape."""

    def configure_models(self) -> None:
        self.net = Blocks()
        self.net.start, self.net.head = self.net.embed, nn.Linear(8, 2)
        del self.net.embed


#: In this order, both as an error and as a warning.
PROBLEMS = [
    "models.net.start.weight: missing in the state",
    "models.net.embed.weight: in the state, not in the model",
    "models.net.head.weight: shape (1, 8) in the state, shape (2, 8) in the model",
    "optimizers.net.net.start.bias: missing in the state",
]


def trained(trainer: Any) -> dict[str, Any]:
    state = trainer.state_dict()
    return flat({part: state[part] for part in ("models", "optimizers")})


def save(root: Path) -> dict[str, Any]:
    trainer = laid_out(root, "single", Plain, max_steps=2)
    trainer.fit()
    trainer.save_checkpoint(root / "single")
    return trained(trainer)


def load(root: Path, layout: str) -> tuple[dict[str, Any], str, list[str], bool]:
    """The state; the error and the warnings of one that does not fit; if what fits was loaded."""
    trainer = laid_out(root, layout, Plain, max_steps=3)
    trainer.load_checkpoint(root / "single")
    loaded = trained(trainer)
    trainer.fit()
    other = laid_out(root, layout, Renamed)
    other.prepare()
    before = trained(other)
    with pytest.raises(StateError) as raised:
        other.load_checkpoint(root / "single")
    assert differences(before, trained(other)) == []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        other.load_checkpoint(root / "single", strict=False)
    name = "/models/net/blocks.1.up.weight"
    told = [str(one.message) for one in caught if "not loaded" in str(one.message)]
    return loaded, str(raised.value), told, trained(other)[name] == loaded[name]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("traps")
    return root, run_ranks(1, save, root)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_14_and_15_a_checkpoint_loads_anywhere_and_tells_what_does_not_fit(
    saved: tuple[Path, dict[str, Any]], layout: str
) -> None:
    root, expected = saved
    for loaded, error, told, is_there in run_ranks(LAYOUTS[layout].size, load, root, layout):
        assert differences(expected, loaded) == []
        assert is_there
        assert len(told) == 1
        for text in (error, told[0]):
            places = [text.find(problem) for problem in PROBLEMS]
            assert places == sorted(places), text
            assert places[0] >= 0, text


def stock(model: nn.Module) -> Fabric:
    def parallelize(module: nn.Module, mesh: Any) -> nn.Module:
        fully_shard(module, mesh=mesh["data_parallel"])
        return module

    strategy = ModelParallelStrategy(parallelize, data_parallel_size=2, tensor_parallel_size=1)
    return Fabric(accelerator="cpu", devices=2, strategy=strategy)


def test_14_is_still_there(tmp_path: Path) -> None:
    def write() -> None:
        model = nn.Linear(4, 4)
        fabric = stock(model)
        fabric.launch()
        fabric.save(tmp_path / "sharded", {"model": fabric.setup(model)})

    def read() -> bool:
        fabric = Fabric(accelerator="cpu", devices=1)
        model = fabric.setup(nn.Linear(4, 4))
        with pytest.raises(Exception):  # noqa: B017 - whatever it is
            fabric.load(tmp_path / "sharded", {"model": model})
        return True

    run_ranks(2, write)
    assert run_ranks(1, read) == [True]


def test_15_is_still_there(tmp_path: Path) -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.save(tmp_path / "file", {"model": fabric.setup(nn.Linear(4, 4))})
    model = fabric.setup(nn.Sequential(nn.Linear(4, 4)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fabric.load(tmp_path / "file", {"model": model}, strict=False) == {}
