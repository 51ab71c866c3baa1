"""Offload, recomputed activations and compiled blocks change no number and no name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import TinyTrainer, mlp, run_ranks, tiny
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from dream_trainer.world import DreamFabric, MeshStrategy
from dream_trainer.world.blocks import blocks_of

pytestmark = [pytest.mark.distributed, pytest.mark.may_leave("rng")]


class Block(nn.Module):
    calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            Block.calls += 1
        return x + self.layer(x).tanh()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.rest = mlp()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.rest(x)


class Trainer(TinyTrainer):
    """Writes down in which order its policies are applied."""

    def __init__(self, config: Any, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        self.order: list[str] = []

    def configure_models(self) -> None:
        self.net = Net()

    def apply_tensor_parallel(self, model: nn.Module, mesh: Any) -> None:
        self.order.append("tensor_parallel")

    def apply_activation_checkpointing(self, model: nn.Module) -> None:
        self.order.append("activation_checkpointing")
        super().apply_activation_checkpointing(model)

    def apply_compile(self, model: nn.Module) -> None:
        self.order.append("compile")
        for block in blocks_of(model):
            block.compile(backend="eager")

    def apply_fully_shard(self, model: nn.Module, **fsdp_arguments: Any) -> None:
        self.order.append("fully_shard")
        super().apply_fully_shard(model, **fsdp_arguments)


def fit(root: Path, size: int, **options: Any) -> list[Any]:
    def rank() -> Any:
        torch.set_default_dtype(torch.float64)
        made: dict[str, Any] = {"num_samples": 16, "gradient_clip_val": 0.3, "max_steps": 4}
        made["has_validation"] = False
        if size > 1:
            made |= {"dp_replicate": 1, "dp_shard": 2}
        data_parallel = min(size, 2)
        trainer = tiny(root, Trainer, devices=size, batch_size=4 // data_parallel, **made | options)
        Block.calls = 0
        trainer.fit()
        calls = Block.calls
        state = trainer.state_dict()
        whole = {
            name: (v.full_tensor() if isinstance(v, DTensor) else v).tolist()
            for name, v in state["models"]["net"].items()
        }
        (optimizer,) = state["optimizers"].values()
        return whole, sorted(optimizer["state"]), trainer.order, calls

    return run_ranks(size, rank, time_limit=120)


CASES: dict[str, dict[str, Any]] = {
    "offload": {"cpu_offload": True},
    "recomputed": {"checkpoint_activations": True},
    "compiled": {"compile_model": True},
    "all": {"cpu_offload": True, "checkpoint_activations": True, "compile_model": True},
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return fit(tmp_path_factory.mktemp("plain"), 1, experiment="plain", enable=False)[0]


@pytest.mark.parametrize("case", CASES)
def test_a_policy_changes_no_number_and_no_name(tmp_path: Path, case: str, plain: Any) -> None:
    for weights, names, order, calls in fit(tmp_path, 2, enable=False, **CASES[case]):
        assert weights.keys() == plain[0].keys()
        assert names == plain[1]
        for name, value in weights.items():
            expected = torch.tensor(plain[0][name])
            torch.testing.assert_close(torch.tensor(value), expected, rtol=1e-10, atol=1e-12)
        assert order[-1] == "fully_shard"
        if case == "recomputed":
            assert calls == 2 * plain[3]


def test_policies_are_applied_in_the_one_order_that_works(tmp_path: Path) -> None:
    options = CASES["all"] | {"tensor_parallel": 2, "max_steps": 1}
    expected = ["tensor_parallel", "activation_checkpointing", "compile", "fully_shard"]
    for _, _, order, _ in fit(tmp_path, 4, enable=False, **options):
        assert order == expected


def test_a_checkpoint_travels_between_compiled_recomputed_and_plain(
    tmp_path: Path, plain: Any
) -> None:
    fit(tmp_path, 2, max_steps=2, every_n_steps=2, **CASES["all"])
    ((weights, names, _, _),) = fit(tmp_path, 1)
    assert names == plain[1]
    for name, value in weights.items():
        expected = torch.tensor(plain[0][name])
        torch.testing.assert_close(torch.tensor(value), expected, rtol=1e-10, atol=1e-12)


def test_offloaded_shards_are_pinned_where_there_is_an_accelerator_only() -> None:
    def rank() -> bool:
        strategy = MeshStrategy(dp_shard=1, cpu_offload=True)
        fabric = DreamFabric(accelerator="auto", devices=1, strategy=strategy)
        fabric.launch()
        return strategy.fsdp_arguments["offload_policy"].pin_memory

    assert run_ranks(1, rank) == [torch.cuda.is_available()]


# ---------------------------------------------------------------------- what a block is


class Layers(nn.Module):
    """Has no ``forward``: the model calls its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)


class Nested(nn.Module):
    """Lists in lists, an encoder beside a larger decoder, a small list that is no block list."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleList([nn.ModuleList([nn.Linear(4, 4)]), Layers()])
        self.decoder = nn.ModuleList([nn.Linear(4, 4) for _ in range(4)])
        self.decoder.append(self.decoder[0])
        self.small = nn.ModuleList([nn.Linear(4, 1)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder[1].second(self.encoder[1].first(self.encoder[0][0](x)))
        for layer in self.decoder:
            x = layer(x)
        return self.small[0](x)


def test_blocks_are_what_can_be_called_each_once() -> None:
    model = Nested()
    names = [name for name, part in model.named_modules() if part in blocks_of(model)]
    assert names == [
        "encoder.0.0",
        "encoder.1.first",
        "encoder.1.second",
        *(f"decoder.{index}" for index in range(4)),
    ]
    assert blocks_of(nn.Linear(2, 2)) == []


def test_a_model_of_nested_lists_trains_sharded() -> None:
    def rank() -> Any:
        fabric = DreamFabric(accelerator="cpu", devices=2, strategy=MeshStrategy(dp_shard=2))
        fabric.launch()
        torch.manual_seed(1)
        model = fabric.setup(Nested())
        fabric.backward(model(torch.ones(2, 4)).sum())
        sharded = [name for name, m in model.module.named_modules() if isinstance(m, FSDPModule)]
        return all(p.grad is not None for p in model.parameters()), len(sharded)

    assert run_ranks(2, rank) == [(True, 8)] * 2


def test_a_block_that_is_used_without_being_called_says_what_to_do() -> None:
    class Inlined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.blocks[0].weight) + self.blocks[1](x)

    def rank() -> str:
        fabric = DreamFabric(accelerator="cpu", devices=2, strategy=MeshStrategy(dp_shard=2))
        fabric.launch()
        model = fabric.setup(Inlined())
        with pytest.raises(RuntimeError) as caught:
            model(torch.ones(2, 3))
        return "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])

    for text in run_ranks(2, rank):
        assert "was sharded, and used without being called" in text
        assert "apply_fully_shard" in text
