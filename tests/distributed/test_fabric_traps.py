"""What Fabric does that surprises: it still does, and with ours it does not.

The numbers are those of the list of traps that this package absorbs. ``plain`` is a stock
``Fabric`` with a ``MeshStrategy``, as an existing script would have it after one import.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import ModelParallelStrategy
from support import flat, run_ranks
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from dream_trainer.world import DreamFabric, MeshStrategy

pytestmark = pytest.mark.distributed


def stock_strategy() -> ModelParallelStrategy:
    """Lightning's own strategy for FSDP2."""

    def parallelize(module: nn.Module, mesh: Any) -> nn.Module:
        fully_shard(module, mesh=mesh["data_parallel"])
        return module

    return ModelParallelStrategy(parallelize, data_parallel_size=2, tensor_parallel_size=1)


def stock() -> Fabric:
    return Fabric(accelerator="cpu", devices=2, strategy=stock_strategy())


FABRICS: dict[str, Any] = {
    "plain": lambda: Fabric(accelerator="cpu", devices=2, strategy=MeshStrategy(dp_shard=2)),
    "dream": lambda: DreamFabric(accelerator="cpu", devices=2, strategy=MeshStrategy(dp_shard=2)),
    "dream on stock": lambda: DreamFabric(accelerator="cpu", devices=2, strategy=stock_strategy()),
    "ddp": lambda: DreamFabric(accelerator="cpu", devices=2, strategy="ddp"),
}
MESH = ["plain", "dream"]


def launched(make: Any) -> Fabric:
    fabric = make()
    fabric.launch()
    torch.manual_seed(7)
    return fabric


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def loss_of(model: Any) -> Tensor:
    return model(torch.ones(2, 4)).square().mean()


def trap_1(make: Any) -> bool:
    """Whether training after a joint setup changes the model."""
    fabric = launched(make)
    model = nn.Linear(4, 4)
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    before = whole(model.weight).clone()
    fabric.backward(loss_of(model))
    optimizer.step()
    return not torch.equal(before, whole(model.weight))


def trap_2(make: Any) -> tuple[bool, bool, bool]:
    """Whether gradients are there after each of three backward passes."""
    fabric = launched(make)
    model = fabric.setup_module(nn.Linear(4, 4))
    found = []
    for accumulating in (True, False):
        with fabric.no_backward_sync(model, enabled=accumulating):
            fabric.backward(loss_of(model))
        found.append(model.weight.grad is not None)
    model.zero_grad()
    fabric.backward(loss_of(model))
    found.append(model.weight.grad is not None)
    return tuple(found)  # type: ignore[return-value]


class Counter:
    def __init__(self) -> None:
        self.count = 0

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


def objects(fabric: Fabric) -> dict[str, Any]:
    """Two models, two optimizers, something stateful and something plain."""
    state: dict[str, Any] = {}
    for name in ("a", "b"):
        state[name] = fabric.setup_module(nn.Linear(4, 4))
        optimizer = torch.optim.AdamW(state[name].parameters(), lr=0.1)
        state[f"{name}_optimizer"] = fabric.setup_optimizers(optimizer)
    return state | {"counter": Counter(), "note": "x"}


def train(fabric: Fabric, state: dict[str, Any]) -> None:
    for name in ("a", "b"):
        fabric.backward(loss_of(state[name]))
        state[f"{name}_optimizer"].step()
        state[f"{name}_optimizer"].zero_grad()


def traps_4_and_5(make: Any, path: Path) -> dict[str, bool]:
    """Save two models and stateful objects in one checkpoint, load them into others."""
    fabric = launched(make)
    saved = objects(fabric)
    train(fabric, saved)
    saved["counter"].count = 5
    fabric.save(path, saved | {"more": 1})
    fresh = objects(fabric)
    counter, fresh["note"] = fresh["counter"], "y"
    rest = fabric.load(path, fresh)
    train(fabric, saved)
    train(fabric, fresh)
    return {
        "models": all(
            flat(saved[name].state_dict()) == flat(fresh[name].state_dict()) for name in "ab"
        ),
        "counter": fresh["counter"] is counter and counter.count == 5,
        "note": fresh["note"] == "x",
        "rest": rest == {"more": 1},
    }


def trap_16(make: Any) -> tuple[type, int, float, float]:
    """Kind, dimensions and value of a norm, and the norm after clipping."""
    fabric = launched(make)
    model = fabric.setup_module(nn.Linear(4, 4))
    optimizer = fabric.setup_optimizers(torch.optim.SGD(model.parameters(), lr=0.1))
    fabric.backward(loss_of(model))
    norm = fabric.clip_gradients(model, optimizer, max_norm=0.01)
    after = torch.stack([whole(p.grad).norm() for p in model.parameters()]).norm()
    return type(norm), norm.ndim, float(whole(norm)), float(after)


# ---------------------------------------------------------------------- with ours


@pytest.mark.parametrize("name", MESH)
def test_1_a_joint_setup_trains_the_sharded_model(name: str) -> None:
    assert run_ranks(2, trap_1, FABRICS[name]) == [True, True]


@pytest.mark.parametrize("name", [*MESH, "dream on stock"])
def test_2_accumulation_leaves_gradient_sync_as_it_found_it(name: str) -> None:
    assert run_ranks(2, trap_2, FABRICS[name]) == [(False, True, True)] * 2


@pytest.mark.parametrize("name", [*MESH, "ddp"])
def test_4_and_5_several_models_and_stateful_objects_in_one_checkpoint(
    name: str, tmp_path: Path
) -> None:
    results = run_ranks(2, traps_4_and_5, FABRICS[name], tmp_path / "checkpoint")
    assert results == [dict.fromkeys(("models", "counter", "note", "rest"), True)] * 2


@pytest.mark.parametrize("name", ["dream", "dream on stock", "ddp"])
def test_16_a_gradient_norm_is_a_plain_tensor(name: str) -> None:
    def alone() -> Any:
        return trap_16(lambda: DreamFabric(accelerator="cpu", devices=1))

    ((kind, ndim, norm, after),) = run_ranks(1, alone)
    assert (kind, ndim) == (Tensor, 0)
    for other in run_ranks(2, trap_16, FABRICS[name]):
        assert other[:2] == (Tensor, 0)
        assert other[2:] == pytest.approx((norm, after), rel=1e-6)


def test_dream_fabric_saves_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    fabric = DreamFabric(accelerator="cpu", devices=1)
    fabric.save(path, {"value": 1})

    class Bad:
        def __reduce__(self) -> Any:
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        fabric.save(path, {"value": 2, "bad": Bad()})
    assert fabric.load(path) == {"value": 1}
    assert [one.name for one in tmp_path.iterdir()] == ["state.pt"]


def test_dream_fabric_is_a_fabric_with_the_same_signature() -> None:
    import inspect

    assert issubclass(DreamFabric, Fabric)
    assert inspect.signature(DreamFabric) == inspect.signature(Fabric)


# ---------------------------------------------------------------------- without


def test_1_is_still_there() -> None:
    assert run_ranks(2, trap_1, stock) == [False, False]


def test_2_is_still_there() -> None:
    assert run_ranks(2, trap_2, stock) == [(False, True, False)] * 2


def test_4_is_still_there(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="Found multiple distributed models"):
        run_ranks(2, traps_4_and_5, stock, tmp_path / "checkpoint")


def test_5_is_still_there(tmp_path: Path) -> None:
    def rank() -> Any:
        fabric = launched(stock)
        model, counter = fabric.setup_module(nn.Linear(4, 4)), Counter()
        fabric.save(tmp_path / "checkpoint", {"model": model, "counter": counter})
        state = {"model": model, "counter": counter}
        fabric.load(tmp_path / "checkpoint", state)
        return state["counter"]

    assert run_ranks(2, rank) == [{"count": 0}] * 2


def test_16_is_still_there() -> None:
    assert [kind for kind, *_ in run_ranks(2, trap_16, stock)] == [DTensor] * 2
