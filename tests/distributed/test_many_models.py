"""Several models and optimizers in one run: the same losses on one device, DDP and FSDP2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import TinyTrainer, flat, run_ranks, tiny
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW

pytestmark = [pytest.mark.distributed, pytest.mark.may_leave("rng")]

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "single": (1, {}),
    "ddp": (2, {"dp_replicate": 2}),
    "fsdp": (2, {"dp_replicate": 1, "dp_shard": 2}),
    "hsdp": (4, {"dp_replicate": 2, "dp_shard": 2}),
}


class Net(nn.Module):
    """Blocks, and parameters of the root's own."""

    def __init__(self, inputs: int = 3, outputs: int = 1) -> None:
        super().__init__()
        self.stem = nn.Linear(inputs, 4)
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.head = nn.Linear(4, outputs)

    def features(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x).tanh()
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def train_only(*, train: nn.Module, freeze: nn.Module) -> None:
    train.requires_grad_(True)
    freeze.requires_grad_(False)


class Many(TinyTrainer):
    def configure_schedulers(self) -> Any:
        return None


class Gan(Many):
    """Two models with an optimizer each, frozen in turns; the critic is called twice a loss."""

    def configure_models(self) -> None:
        self.generator = Net(3, 4)
        self.critic = Net(4)

    def configure_optimizers(self) -> Any:
        return {
            self.generator: Adam(self.generator.parameters(), lr=0.02, betas=(0.5, 0.9)),
            self.critic: Adam(self.critic.parameters(), lr=0.02, betas=(0.5, 0.9)),
        }

    def compute_loss(self, batch: Any, batch_idx: int) -> Any:
        return -self.critic(self.generator(batch["x"])).mean()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        real = torch.cat([batch["x"], batch["y"]], 1)
        train_only(train=self.critic, freeze=self.generator)
        fake = self.generator(batch["x"])
        critic_loss = self.critic(fake).mean() - self.critic(real).mean()
        self.backward(critic_loss)
        critic_norm = self.step("critic")
        train_only(train=self.generator, freeze=self.critic)
        loss = self.compute_loss(batch, batch_idx)
        self.backward(loss)
        norm = self.step("generator")
        losses = {"critic_loss": critic_loss, "loss": loss}
        if norm is None or critic_norm is None:
            return losses
        return losses | {"norm": norm, "critic_norm": critic_norm}


class TeacherStudent(Many):
    """A teacher that is frozen at set-up, and trained from the second epoch on."""

    def configure_models(self) -> None:
        self.teacher = Net()
        self.teacher.requires_grad_(False)
        self.student = Net()
        self.student.blocks[0].requires_grad_(False)

    def configure_optimizers(self) -> Any:
        return AdamW([*self.student.parameters(), *self.teacher.parameters()], lr=0.05)

    def compute_loss(self, batch: Any, batch_idx: int) -> Any:
        if self.is_fitting and self.current_epoch == 1 and torch.is_grad_enabled():
            self.teacher.requires_grad_(True)
            self.student.blocks[0].requires_grad_(True)
        taught = self.teacher(batch["x"])
        loss = (self.student(batch["x"]) - taught).square().mean()
        return loss + (taught - batch["y"]).square().mean()


class PartsInTurns(Many):
    """One model with two optimizers; which part is trained changes with every step."""

    def configure_models(self) -> None:
        self.net = Net()

    def configure_optimizers(self) -> Any:
        body = [*self.net.stem.parameters(), *self.net.blocks.parameters()]
        return {"body": SGD(body, lr=0.05), "head": AdamW(self.net.head.parameters(), lr=0.05)}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        trains_head = batch_idx % 2 == 0
        self.net.head.requires_grad_(trains_head)
        self.net.stem.requires_grad_(not trains_head)
        self.net.blocks.requires_grad_(not trains_head)
        loss = self.compute_loss(batch, batch_idx)
        self.backward(loss)
        self.step("body")
        self.step("head")
        return loss


class SharedParameters(Many):
    """The first and the last layer are one; two blocks are one; one optimizer over two models."""

    def configure_models(self) -> None:
        self.net = Net(4, 4)
        self.net.head.weight = self.net.stem.weight
        self.net.blocks.extend([nn.Linear(4, 4), self.net.blocks[0]])
        self.net.blocks[2].weight = self.net.blocks[1].weight
        self.other = Net()

    def configure_optimizers(self) -> Any:
        return AdamW([*self.net.parameters(), *self.other.parameters()], lr=0.05)

    def compute_loss(self, batch: Any, batch_idx: int) -> Any:
        x = torch.cat([batch["x"], batch["y"]], 1)
        other = self.other(batch["x"])
        return (self.net(x) - x).square().mean() + (other - batch["y"]).square().mean()


KINDS = {kind.__name__: kind for kind in (Gan, TeacherStudent, PartsInTurns, SharedParameters)}


def fit(root: Path, layout: str, experiment: str, kind: type[TinyTrainer], **options: Any) -> Any:
    size, sizes = LAYOUTS[layout]

    def rank() -> Any:
        torch.set_default_dtype(torch.float64)
        made: dict[str, Any] = {"batch_size": 4 // size, "gradient_clip_val": 0.5}
        trainer = tiny(
            root,
            kind,
            experiment=experiment,
            devices=size,
            num_samples=20,
            **made | sizes | options,
        )
        trainer.fit()
        assert options.get("max_steps") or trainer.current_epoch == 2
        return flat(trainer.state_dict()["models"])

    ranks = run_ranks(size, rank)
    assert all(weights == ranks[0] for weights in ranks)
    return ranks[0]


def log(root: Path, experiment: str) -> list[dict[str, float]]:
    path = root / "default" / "default" / experiment / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("name", KINDS)
def test_every_layout_has_the_losses_of_one_device(tmp_path: Path, name: str) -> None:
    layouts = ["single", "ddp", "fsdp"] + ["hsdp"] * (name == "TeacherStudent")
    for layout in layouts:
        fit(tmp_path, layout, layout, KINDS[name])
    expected = log(tmp_path, "single")
    assert len([row for row in expected if "train/loss" in row]) == 10
    for layout in layouts[1:]:
        rows = log(tmp_path, layout)
        assert [row.keys() for row in rows] == [row.keys() for row in expected]
        for row, single in zip(rows, expected, strict=True):
            assert row == pytest.approx(single, rel=1e-10, abs=1e-12), (layout, row["step"])


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", KINDS)
def test_a_resumed_run_is_the_same_run(tmp_path: Path, name: str, layout: str) -> None:
    straight = fit(tmp_path, layout, "straight", KINDS[name], gradient_accumulation_steps=2)
    fit(tmp_path, layout, "cut", KINDS[name], gradient_accumulation_steps=2, max_steps=4)
    assert fit(tmp_path, layout, "cut", KINDS[name], gradient_accumulation_steps=2) == straight
    assert log(tmp_path, "cut") == log(tmp_path, "straight")
