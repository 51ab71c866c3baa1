"""On three and more DDP ranks the place of a gradient in its bucket decides how it is rounded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import TinyTrainer, differences, exact_state, run_ranks, tiny
from torch import nn

pytestmark = [pytest.mark.distributed, pytest.mark.may_leave("rng")]


class Wider(TinyTrainer):
    """Wide enough for sums over three ranks to round differently in another order."""

    def configure_models(self) -> None:
        self.net = nn.Sequential(nn.Linear(3, 64), nn.Tanh(), nn.Linear(64, 64), nn.Linear(64, 1))


def train(root: Path, experiment: str, max_steps: int) -> dict[str, Any]:
    trainer = tiny(root, Wider, experiment=experiment, max_steps=max_steps, num_samples=48)
    trainer.fit()
    return exact_state(trainer)


def test_three_ddp_ranks_go_on_to_the_bit(tmp_path: Path) -> None:
    straight = run_ranks(3, train, tmp_path, "straight", 6)
    run_ranks(3, train, tmp_path, "cut", 2)
    resumed = run_ranks(3, train, tmp_path, "cut", 6)
    assert [differences(*pair) for pair in zip(straight, resumed, strict=True)] == [[], [], []]


class Words(TinyTrainer):
    def configure_models(self) -> None:
        layers = nn.Embedding(30, 3, sparse=True), nn.Linear(3, 8), nn.Linear(8, 1)
        self.net = nn.Sequential(*layers)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), lr=0.1)

    def compute_loss(self, batch: Any, batch_idx: int) -> Any:
        return (self.net(batch["index"]) - batch["y"]).square().mean()


def test_no_gradient_is_left_before_the_first_step_and_sparse_ones_are_fine(
    tmp_path: Path,
) -> None:
    def rank() -> list[bool]:
        trainer = tiny(tmp_path, Words, max_steps=2, enable=False)
        trainer.prepare()
        left = [parameter.grad is not None for parameter in trainer.net.parameters()]
        trainer.fit()
        return left

    assert run_ranks(2, rank) == [[False] * 5] * 2


def test_stock_ddp_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dream_trainer.world.module_setup.fix_bucket_order", lambda module: None)
    straight = run_ranks(3, train, tmp_path, "straight", 4)
    run_ranks(3, train, tmp_path, "cut", 2)
    resumed = run_ranks(3, train, tmp_path, "cut", 4)
    assert differences(straight[0], resumed[0]) != []
