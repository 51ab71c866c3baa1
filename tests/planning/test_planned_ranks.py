"""What is planned for ranks is what real ranks hold: to the byte, the batch and the step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import Points, RankError, TinyTrainer, run_ranks, tiny_config
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.utils.data import DataLoader

from dream_trainer import RunPlan, plan_run
from dream_trainer.callbacks import Callback
from dream_trainer.errors import ConfigError
from dream_trainer.world.window_gradients import window_gradients

pytestmark = [pytest.mark.may_leave("rng"), pytest.mark.distributed]


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).tanh())


class Net(nn.Module):
    """Blocks, a tied weight, a buffer, a frozen part, odd sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 6)
        self.blocks = nn.ModuleList(Block(6) for _ in range(2))
        self.frozen = nn.Linear(6, 5).requires_grad_(False)
        self.head = nn.Linear(5, 1)
        self.again = self.head
        self.register_buffer("scale", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner((x * self.scale).to(x.dtype))
        for block in self.blocks:
            x = block(x)
        return self.again(self.frozen(x))


class PlannedTrainer(TinyTrainer):
    """A net of odd sizes under a chosen optimizer."""

    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW

    def configure_models(self) -> None:
        self.net = Net()

    def configure_optimizers(self) -> Any:
        trained = [p for p in self.net.parameters() if p.requires_grad]
        return type(self).optimizer(trained, lr=self.config.lr)

    def configure_dataloaders(self) -> Any:
        config = self.config
        return (
            DataLoader(Points(config.num_samples), config.batch_size, shuffle=True),
            DataLoader(Points(config.num_val_samples, seed=6), config.batch_size),
        )

    def apply_tensor_parallel(self, model: nn.Module, mesh: DeviceMesh) -> None:
        for block in model.blocks:
            plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
            parallelize_module(block, mesh, plan)


class Momentum(PlannedTrainer):
    optimizer = staticmethod(lambda *a, **k: torch.optim.SGD(*a, momentum=0.9, **k))


class PlainSgd(PlannedTrainer):
    optimizer = torch.optim.SGD


class Factored(PlannedTrainer):
    optimizer = torch.optim.Adafactor


class SeveralModels(PlannedTrainer):
    """A student, a frozen teacher and a critic; two optimizers."""

    def configure_models(self) -> None:
        self.net = Net()
        self.teacher = Net().requires_grad_(False)
        self.critic = nn.Linear(3, 7)

    def configure_optimizers(self) -> Any:
        student = [p for p in self.net.parameters() if p.requires_grad]
        return {
            "student": torch.optim.AdamW(student, amsgrad=True),
            "critic": torch.optim.SGD(self.critic.parameters(), lr=0.1, momentum=0.9),
        }

    def configure_schedulers(self) -> Any:
        return None

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        wanted = self.teacher(batch["x"]).detach()
        loss = (self.net(batch["x"]) - wanted).square().mean()
        self.backward(loss + self.critic(batch["x"]).square().mean())
        self.step("student")
        self.step("critic")
        return {"loss": loss}


class Measuring(Callback):
    """Measures gradients inside a window and before a step, and counts batches."""

    def __init__(self) -> None:
        self.window_bytes = self.gradient_bytes = self.batches = 0

    def post_train_step(self, trainer: Any, result: Any, batch: Any, batch_idx: int) -> None:
        self.batches += trainer.current_epoch == 0
        models = trainer.components.models
        is_sharded = any(isinstance(m, FSDPModule) for m in models.values())
        if trainer.is_accumulating_gradients and is_sharded:
            self.window_bytes = _bytes(window_gradients(models).values())

    def pre_optimizer_step(self, trainer: Any, optimizer: Any) -> None:
        parameters = (p for m in trainer.components.models.values() for p in m.parameters())
        held = _bytes(p.grad for p in parameters if p.grad is not None)
        self.gradient_bytes = max(self.gradient_bytes, held)  # before the first of two steps


def _bytes(tensors: Any) -> int:
    local = (t.to_local() if isinstance(t, DTensor) else t for t in tensors)
    return sum(t.numel() * t.element_size() for t in local)


def held(kind: type[PlannedTrainer], root: str, options: dict[str, Any]) -> dict[str, Any]:
    """Train, and tell what this rank holds."""
    measuring = Measuring()
    trainer = kind(tiny_config(root, callbacks={"measuring": measuring}, **options))
    trainer.fit()
    models = trainer.components.models.values()
    states = [s for o in trainer.components.optimizers.values() for s in o.state.values()]
    directory = trainer.run_directory / "checkpoints"
    (checkpoint,) = (path for path in directory.glob("step-*"))
    return {
        "parameters": _bytes(p for m in models for p in m.parameters()),
        "gradients": measuring.gradient_bytes,
        "optimizer_state": _bytes(
            v for state in states for v in state.values() if isinstance(v, Tensor)
        ),
        "buffers": _bytes(b for m in models for b in m.buffers()),
        "window_gradients": measuring.window_bytes,
        "averages": 0,
        "batches": measuring.batches,
        "val_batches": trainer.loop.val_loader.num_batches,
        "steps": trainer.global_step,
        "samples_per_step": trainer.window.size * trainer.world.dp_size * trainer.config.batch_size,
        "rank_files": {
            int(path.name.split("_")[2]): path.stat().st_size
            for path in checkpoint.glob("__*.distcp")
        },
        "on_disk": sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file()),
    }


def planned_for(plan: RunPlan, rank: int) -> dict[str, Any]:
    numbers = plan.bytes_on(rank)
    del numbers["gathered"], numbers["checkpoint"]
    assert plan.train is not None
    assert plan.val is not None
    return {
        **numbers,
        "batches": plan.train.batches,
        "val_batches": plan.val.batches,
        "steps": plan.steps.total,
        "samples_per_step": plan.steps.samples_per_step,
    }


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "single": (1, {}),
    "DDP x2": (2, {}),
    "FSDP2 x2": (2, {"dp_replicate": 1, "dp_shard": 2}),
    "FSDP2 x2, bf16": (2, {"dp_replicate": 1, "dp_shard": 2, "precision": "bf16-mixed"}),
    "FSDP2 x4": (4, {"dp_replicate": 1, "dp_shard": 4}),
    "HSDP 2x2": (4, {"dp_replicate": 2, "dp_shard": 2}),
    "TP x2": (2, {"dp_replicate": 1, "tensor_parallel": 2}),
    "FSDP2 x TP 2x2": (4, {"dp_replicate": 1, "dp_shard": 2, "tensor_parallel": 2}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_hold_and_do_what_was_planned(layout: str, tmp_path: Path) -> None:
    size, devices = LAYOUTS[layout]
    check(PlannedTrainer, size, devices, tmp_path)


@pytest.mark.parametrize(
    ("kind", "dp_shard"), [(Momentum, 2), (PlainSgd, 2), (Factored, 1)], ids=str
)
def test_the_state_of_any_optimizer_is_as_planned(
    kind: type[PlannedTrainer], dp_shard: int, tmp_path: Path
) -> None:
    check(kind, 2, {"dp_shard": dp_shard}, tmp_path)


@pytest.mark.parametrize("dp_shard", [1, 2])
def test_several_models_and_optimizers_are_as_planned(dp_shard: int, tmp_path: Path) -> None:
    check(SeveralModels, 2, {"dp_shard": dp_shard}, tmp_path)


def test_an_optimizer_that_ranks_cannot_step_with_is_refused(tmp_path: Path) -> None:
    options = {"dp_shard": 2, "n_epochs": 1}
    with pytest.raises(ConfigError, match=r"net \(Adafactor\) cannot step"):
        plan_run(Factored, tiny_config(tmp_path, **options), 2)
    with pytest.raises(RankError, match="in-place operations that require placement changes"):
        run_ranks(2, held, Factored, str(tmp_path), options)


def check(kind: type[PlannedTrainer], size: int, devices: dict[str, Any], root: Path) -> None:
    # 25 samples in batches of 4 on each rank, 3 batches a step: the last window is uneven.
    options = {
        **devices,
        "num_samples": 25,
        "gradient_accumulation_steps": 3,
        "n_epochs": 2,
        "keep_last": 1,
        "keep_top_k": 0,
    }
    # Planned first: nothing of it may reach the ranks, which are forks of this process.
    plan = plan_run(kind, tiny_config(root, **options), size, ranks_per_node=size)
    real = run_ranks(size, held, kind, str(root), options)
    for rank, numbers in enumerate(real):
        on_disk, files = numbers.pop("on_disk"), numbers.pop("rank_files")
        assert planned_for(plan, rank) == numbers, f"rank {rank}"
    assert plan.checkpoint_bytes is not None
    assert plan.checkpoint_bytes_on_disk is not None
    assert plan.checkpoint_bytes < on_disk < plan.checkpoint_bytes_on_disk
    assert plan.checkpoint_bytes_on_disk < 2 * on_disk, "the bound says nothing"
    headers = plan.checkpoint_bytes_on_disk - plan.checkpoint_bytes
    for rank, file_size in files.items():
        assert file_size <= plan.bytes_on(rank)["checkpoint"] + headers, f"rank {rank}"
