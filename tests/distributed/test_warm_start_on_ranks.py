"""Warm starts and exports on two ranks, replicated and sharded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import TinyTrainer, differences, flat, mlp, run_ranks, tiny
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from dream_trainer.callbacks import Callback
from dream_trainer.checkpointing import export_checkpoint
from dream_trainer.errors import CheckpointError, StateError
from dream_trainer.trainer.warm_start import load_weights

pytestmark = [pytest.mark.distributed, pytest.mark.may_leave("rng")]

LAYOUTS = {
    "single": {"devices": 1},
    "ddp": {"devices": 2, "dp_replicate": 2},
    "fsdp": {"devices": 2, "dp_replicate": 1, "dp_shard": 2},
}


def source() -> nn.Sequential:
    torch.manual_seed(99)
    return mlp()


class SeeWeights(Callback):
    weights: dict[str, Any]
    is_sharded: bool

    def pre_fit(self, trainer: Any) -> None:
        parameters = trainer.components.models["net"].parameters()
        self.is_sharded = all(isinstance(one, DTensor) for one in parameters)
        self.weights = flat(trainer.state_dict()["models"])


def fit(root: Path, layout: str, **options: Any) -> tuple[bool, dict[str, Any], dict[str, Any]]:
    """Whether it is sharded, the weights before the first step, those after the last."""
    seen = SeeWeights()
    defaults: dict[str, Any] = {"batch_size": 2, "experiment": layout, "has_validation": False}
    trainer = tiny(root, callbacks={"seen": seen}, **defaults | LAYOUTS[layout] | options)
    trainer.fit()
    return seen.is_sharded, seen.weights, flat(trainer.state_dict()["models"])


def on_ranks(root: Path, layout: str, **options: Any) -> list[Any]:
    return run_ranks(LAYOUTS[layout]["devices"], lambda: fit(root, layout, **options))


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_every_rank_starts_from_the_weights_of_a_file(tmp_path: Path, layout: str) -> None:
    state = {f"backbone.{name}": value for name, value in source().state_dict().items()}
    torch.save({"model": state}, tmp_path / "weights.pt")
    ranks = on_ranks(
        tmp_path,
        layout,
        max_steps=1,
        init_from=str(tmp_path / "weights.pt"),
        init_rename={"backbone": ""},
    )
    for is_sharded, before, after in ranks:
        assert is_sharded == (layout == "fsdp")
        assert differences(before, flat({"net": dict(source().state_dict())})) == []
        assert after != before


class InTwoDimensions(TinyTrainer):
    def apply_tensor_parallel(self, model: Any, mesh: Any) -> None:
        parallelize_module(model, mesh, {"0": ColwiseParallel(), "3": RowwiseParallel()})


def test_a_file_is_spread_over_a_mesh_of_two_dimensions(tmp_path: Path) -> None:
    torch.save(source().state_dict(), tmp_path / "weights.pt")

    def rank() -> dict[str, Any]:
        sizes = {"devices": 4, "dp_replicate": 1, "dp_shard": 2, "tensor_parallel": 2}
        trainer = tiny(tmp_path, InTwoDimensions, enable=False, **sizes)
        trainer.state_dict()  # sets it up
        load_weights(trainer, str(tmp_path / "weights.pt"))
        return flat(trainer.state_dict()["models"])

    for found in run_ranks(4, rank):
        assert differences(found, flat({"net": dict(source().state_dict())})) == []


@pytest.mark.parametrize(
    ("saved", "loaded"), [("fsdp", "single"), ("single", "fsdp"), ("fsdp",) * 2]
)
def test_a_run_gives_its_weights_to_a_run_of_another_layout(
    tmp_path: Path, saved: str, loaded: str
) -> None:
    *_, final = on_ranks(tmp_path / "old", saved, max_steps=2)[0]
    run = tmp_path / "old" / "default" / "default" / saved
    for _, before, _ in on_ranks(tmp_path / "new", loaded, max_steps=1, init_from=str(run)):
        assert differences(before, final) == []


class Wider(TinyTrainer):
    def configure_models(self) -> None:
        self.net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Identity(), nn.Linear(16, 1))


def test_what_does_not_fit_is_an_error_on_every_rank_and_nothing_is_loaded(tmp_path: Path) -> None:
    torch.save(source().state_dict(), tmp_path / "weights.pt")

    def rank() -> tuple[list[str], bool]:
        trainer = tiny(tmp_path, Wider, enable=False, **LAYOUTS["fsdp"])
        before = flat(trainer.state_dict()["models"])
        with pytest.raises(StateError) as caught:
            load_weights(trainer, str(tmp_path / "weights.pt"))
        return list(caught.value.problems), flat(trainer.state_dict()["models"]) == before

    one, other = run_ranks(2, rank)
    assert one == other
    assert len(one[0]) == 3
    assert one[1]


def test_a_file_that_one_rank_cannot_read_is_an_error_on_every_rank(tmp_path: Path) -> None:
    """Otherwise the others would wait for it."""
    torch.save(source().state_dict(), tmp_path / "weights.pt")

    def rank() -> str:
        import os

        import dream_trainer.checkpointing.weights as weights

        if os.environ["RANK"] == "1":
            weights.torch.load = _fails  # type: ignore[attr-defined]
        options: dict[str, Any] = LAYOUTS["fsdp"] | {"init_from": str(tmp_path / "weights.pt")}
        with pytest.raises(CheckpointError) as caught:
            tiny(tmp_path, **options).fit()
        return str(caught.value)

    one, other = run_ranks(2, rank)
    assert one == other
    assert "this node has no such disk" in one


def _fails(*_: Any, **__: Any) -> None:
    raise OSError("this node has no such disk")


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", ["net.pt", "net.safetensors"])
def test_a_checkpoint_of_two_ranks_is_exported_by_one_process(
    tmp_path: Path, layout: str, name: str
) -> None:
    *_, final = on_ranks(tmp_path, layout, max_steps=2)[0]
    path = export_checkpoint(tmp_path / "default" / "default" / layout, tmp_path / name)
    if path.suffix == ".pt":
        state = torch.load(path, weights_only=True)
    else:
        state = pytest.importorskip("safetensors.torch").load_file(path)
    assert differences(flat({"net": state}), final) == []
    mlp().load_state_dict(state)
