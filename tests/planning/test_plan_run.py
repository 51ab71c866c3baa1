"""What a plan tells and refuses, for worlds that no test machine has."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import Points, TinyTrainer, tiny_config
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.utils.data import DataLoader

from dream_trainer import EMA, RunPlan, plan_run
from dream_trainer.errors import ConfigError
from dream_trainer.planning.holdings import TensorKind
from dream_trainer.trainer import AbstractTrainerConfig, BaseTrainer

pytestmark = pytest.mark.usefixtures("untouched_rng", "_in_tmp_path")


@pytest.fixture
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A plan writes nothing, wherever it is made."""
    monkeypatch.chdir(tmp_path)
    yield
    assert list(tmp_path.iterdir()) == []


class Huge(TinyTrainer):
    """Three tebibytes of parameters, and a head with few rows."""

    def configure_models(self) -> None:
        self.net = nn.Module()
        width = 1 << 16
        self.net.blocks = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(192))
        self.net.head = nn.Linear(width, 7)

    def configure_dataloaders(self) -> Any:
        return DataLoader(range(10_000_003), batch_size=2), None  # type: ignore[arg-type]


def planned(kind: type[TinyTrainer], num_ranks: int, **options: Any) -> RunPlan:
    per_node = options.pop("ranks_per_node", 8)
    return plan_run(kind, tiny_config("runs", **options), num_ranks, ranks_per_node=per_node)


def test_averages_are_held_and_saved_as_shards() -> None:
    class Half(Huge):
        def configure_models(self) -> None:
            super().configure_models()
            self.net.bfloat16()
            self.net.head.requires_grad_(False)

    options = {"dp_shard": 64, "dp_replicate": 1}
    plain = planned(Half, 64, **options)
    averaged = planned(Half, 64, **options, callbacks={"ema": EMA(models=["net"])})
    whole = 192 * 4 * (1 << 32)  # float32, without the frozen head
    assert plain.bytes_on(5)["averages"] == 0
    assert averaged.bytes_on(5)["averages"] == whole // 64
    assert plain.checkpoint_bytes is not None
    assert averaged.checkpoint_bytes == plain.checkpoint_bytes + whole
    assert "averages of weights" in str(averaged)
    assert "averages of weights" not in str(plain)


def refused(kind: type[TinyTrainer], num_ranks: int, **options: Any) -> str:
    with pytest.raises(ConfigError) as error:
        planned(kind, num_ranks, **options)
    assert not dist.is_initialized()
    return str(error.value)


# ---------------------------------------------------------------------- what it tells


def test_a_model_of_terabytes_on_4096_ranks() -> None:
    plan = planned(Huge, 4096, dp_shard=64, precision="bf16-mixed", global_batch_size=32768)
    assert not dist.is_initialized()
    layout = plan.layout
    assert (layout.num_nodes, layout.dp_size) == (512, 4096)
    assert [(g.dimension, g.size, g.count, g.nodes, g.first) for g in layout.groups] == [
        ("dp_replicate", 64, 64, 64, "0, 64, 128, ..., 4032"),
        ("dp_shard", 64, 64, 8, "0-63"),
    ]
    (model,) = plan.memory.models
    assert model.trainable == 192 * 2**32 + 7 * 2**16 + 7
    assert model.gathered == ("blocks.191", 2**32 * 2)
    # Of the head's 7 rows the first 7 of 64 ranks hold one.
    blocks = 192 * 2**32 * 4 // 64
    held = [plan.bytes_on(rank)["parameters"] for rank in (0, 6, 7, 63, 64, 4095)]
    row = (2**16 + 1) * 4
    assert held == [blocks + row, blocks + row, blocks, blocks, blocks + row, blocks]
    assert plan.bytes_on(0)["window_gradients"] == model.trainable * 4
    assert plan.train is not None
    assert (plan.train.batches, plan.train.samples_used) == (1221, 10_000_003)
    assert plan.train.last_batch_samples == 10_000_003 - 1220 * 8192
    assert (plan.steps.accumulation, plan.steps.per_epoch, plan.steps.last_window) == (4, 306, 1)
    uneven = "net.head.weight (7, 65536) leaves 57 of 64 ranks with nothing; 2 parameters of net"
    assert any(note.startswith(uneven) for note in plan.notes)


def test_ranks_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def looked_at(num_ranks: int) -> int:
        calls = 0
        local = TensorKind.local

        def counted(*args: Any) -> int:
            nonlocal calls
            calls += 1
            return local(*args)

        with monkeypatch.context() as patch:
            patch.setattr(TensorKind, "local", counted)
            str(planned(Huge, num_ranks, dp_shard=8))
        return calls

    assert looked_at(4096) == looked_at(64)


def test_the_configuration_stays_as_it_is() -> None:
    config = tiny_config("runs", dp_shard=2, accelerator="cuda", experiment=None, seed=None)
    before = repr(config)
    plan_run(TinyTrainer, config, 8)
    assert repr(config) == before


def test_a_plan_is_plain_data_and_a_table() -> None:
    plan = planned(TinyTrainer, 4, dp_shard=2)
    assert json.loads(json.dumps(plan.as_dict()))["layout"]["sizes"] == {
        "dp_replicate": 2,
        "dp_shard": 2,
        "tp": 1,
    }
    lines = str(plan).splitlines()
    assert lines[0] == "4 ranks on 1 node of 4: dp_replicate 2 x dp_shard 2, 32-true"
    assert max(map(len, lines)) <= 80
    with pytest.raises(IndexError, match="rank 4 of 4"):
        plan.bytes_on(4)


def test_a_constructor_that_reads_values_is_run_on_the_cpu() -> None:
    class Reads(TinyTrainer):
        def configure_models(self) -> None:
            super().configure_models()
            self.widths = torch.linspace(1, 8, 2).tolist()

    plan = planned(Reads, 8, dp_shard=2)
    assert plan.bytes_on(0) == planned(TinyTrainer, 8, dp_shard=2).bytes_on(0)
    assert [note for note in plan.notes if note.startswith("models were made on the CPU")]


def test_data_that_is_not_here_leaves_the_rest_of_the_plan() -> None:
    class Elsewhere(TinyTrainer):
        def configure_dataloaders(self) -> Any:
            raise FileNotFoundError("/cluster/tokens.bin")

        def configure_schedulers(self) -> Any:
            (optimizer,) = self.named_optimizers().values()
            steps = self.num_training_steps
            return torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=steps)

    plan = planned(Elsewhere, 8)
    assert plan.train is None
    assert plan.steps.total is None
    assert plan.bytes_on(0) == planned(TinyTrainer, 8).bytes_on(0)
    assert any("/cluster/tokens.bin" in note for note in plan.notes)
    str(plan)


def test_a_loader_without_a_length_is_said_to_be_unknown() -> None:
    class Endless(TinyTrainer):
        def configure_dataloaders(self) -> Any:
            class Stream:
                def __iter__(self) -> Iterator[int]:
                    return iter(range(10**9))

            return Stream(), None

    plan = planned(Endless, 8, max_steps=100)
    assert plan.train is not None
    assert (plan.train.samples, plan.train.batches, plan.steps.per_epoch) == (None, None, None)
    assert plan.steps.total == 100
    assert "unknown" in str(plan)


def test_an_optimizer_without_a_state_to_see_is_said_to_be_unknown() -> None:
    class Closure(TinyTrainer):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.net.parameters())

    plan = planned(Closure, 8)
    assert plan.bytes_on(0)["optimizer_state"] is None
    assert plan.checkpoint_bytes is None
    assert "unknown" in str(plan)
    assert any("LBFGS" in note for note in plan.notes)


def test_fused_kernels_are_no_hindrance() -> None:
    class Fused(TinyTrainer):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.net.parameters(), fused=True)

    plain = planned(TinyTrainer, 8, dp_shard=2)
    assert planned(Fused, 8, dp_shard=2).bytes_on(7) == plain.bytes_on(7)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"dp_shard": 16}, ["a dp_shard group lies on 2 nodes"]),
        ({"dp_shard": 8}, []),
        ({"dp_shard": 6, "ranks_per_node": 4}, ["a dp_shard group lies on 2 nodes"]),
    ],
)
def test_groups_that_leave_their_node_are_named(options: Any, told: list[str]) -> None:
    num_ranks = 96
    plan = planned(TinyTrainer, num_ranks, num_samples=num_ranks, **options)
    found = [note for note in plan.notes if "lies on" in note]
    assert len(found) == len(told)
    assert all(one in note for one, note in zip(told, found, strict=True))


def test_a_trainer_without_conventions_is_planned_too() -> None:
    class Bare(BaseTrainer):
        def configure(self) -> None:
            self.net = nn.Linear(3, 8)

        def setup(self) -> None:
            self.net = self.world.setup(self.net.to(self.world.device))
            self.optimizer = self.world.setup_optimizer(torch.optim.AdamW(self.net.parameters()))

        def named_models(self) -> Any:
            return {"net": self.net}

        def named_optimizers(self) -> Any:
            return {"net": self.optimizer}

        def named_schedulers(self) -> Any:
            return None

        train_dataloader = property(lambda self: DataLoader(range(64), 4))  # type: ignore[arg-type]
        val_dataloader = None

        def training_step(self, batch: Any, batch_idx: int) -> Any: ...

        def validation_step(self, batch: Any, batch_idx: int) -> Any: ...

    plan = plan_run(Bare, tiny_config("runs", dp_shard=4), 8)
    assert plan.bytes_on(0)["optimizer_state"] == 2 * (2 * 3 + 2) * 4 + 2 * 4
    assert plan.steps.total == 4


# ---------------------------------------------------------------------- what it refuses


class Split(TinyTrainer):
    def apply_tensor_parallel(self, model: nn.Module, mesh: DeviceMesh) -> None:
        parallelize_module(model, mesh, {"0": ColwiseParallel(), "3": RowwiseParallel()})


def test_every_reason_is_told_at_once() -> None:
    said = refused(
        TinyTrainer, 20, dp_shard=3, n_epochs=None, global_batch_size=7, ranks_per_node=8
    )
    assert said.splitlines() == [
        "plan:",
        "  - plan: 20 ranks do not fill nodes of 8. Ask for 16 or 24 ranks, or say how many a node "
        "has.",
        "  - device_parameters: dp_replicate=auto x dp_shard=3 x tensor_parallel=1 cannot divide a "
        "world of 20 ranks. Set devices and num_nodes so that there are 3 ranks or a multiple of "
        "that, or change the sizes.",
        "  - training_parameters: n_epochs, max_steps and max_time are all None, so nothing ends "
        "the run. Set one of them.",
        "  - training_parameters: global_batch_size=7 is not a multiple of 4 = batch size 4 x 1 "
        "data-parallel ranks. Change the loader's batch size, the number of ranks or "
        "global_batch_size.",
    ]


def test_reasons_of_models_and_data_come_together() -> None:
    said = refused(TinyTrainer, 8, tensor_parallel=4, num_samples=1)
    assert "TinyTrainer does not say how to split Sequential" in said
    assert "1 samples for 2 data-parallel ranks: 1 of them never get one" in said


def test_layers_that_do_not_divide_are_named() -> None:
    said = refused(Split, 3, tensor_parallel=3)
    assert said.splitlines() == [
        "apply_tensor_parallel:",
        "  - net.0.weight of shape (8, 3): tensor_parallel=3 does not divide dimension 0",
        "  - net.0.bias of shape (8,): tensor_parallel=3 does not divide dimension 0",
        "  - net.3.weight of shape (1, 8): tensor_parallel=3 does not divide dimension 1",
        "Change these sizes, or tensor_parallel, or what is split.",
    ]


@pytest.mark.parametrize(
    ("strategy", "told"),
    [("fdsp", "is none of Fabric's"), ("fsdp", "only a running one knows")],
)
def test_a_strategy_that_cannot_be_planned(strategy: str, told: str) -> None:
    assert told in refused(TinyTrainer, 8, strategy=strategy)


def test_ddp_by_name_is_planned() -> None:
    assert planned(TinyTrainer, 8, strategy="ddp").layout.sizes["dp_replicate"] == 8


def test_more_ranks_than_samples() -> None:
    said = refused(TinyTrainer, 4096, num_samples=1000)
    assert said.splitlines()[0] == (
        "train_dataloader: 1000 samples for 4096 data-parallel ranks: 3096 of them never get one"
    )


@pytest.mark.parametrize(
    "left",
    [
        {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "RANK": "1", "LT_ACCELERATOR": "cuda"},
        {"SLURM_NTASKS": "8", "SLURM_JOB_NAME": "train", "SLURM_NTASKS_PER_NODE": "8"},
    ],
    ids=["torchrun", "a batch job of SLURM"],
)
def test_what_a_launcher_left_in_the_environment_counts_for_nothing(
    left: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = str(planned(TinyTrainer, 8, dp_shard=2))
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    assert str(planned(TinyTrainer, 8, dp_shard=2)) == plan


def test_what_the_users_methods_raise_passes_through() -> None:
    class Broken(TinyTrainer):
        def configure_optimizers(self) -> Any:
            raise ZeroDivisionError("in user code")

    with pytest.raises(ZeroDivisionError, match="in user code"):
        planned(Broken, 8, dp_shard=2)
    assert not dist.is_initialized()


def test_a_trainer_without_a_loop_is_refused() -> None:
    with pytest.raises(ConfigError, match="AbstractTrainerConfig is no BaseTrainerConfig"):
        plan_run(TinyTrainer, AbstractTrainerConfig(), 8)  # type: ignore[type-var]


def test_points_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Points, "__getitem__", lambda self, index: pytest.fail("a sample was read"))
    planned(TinyTrainer, 8, dp_shard=2)
