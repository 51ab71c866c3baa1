"""What steers a run steers that of a LightningModule as well, with the module's own schedules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from modules import Adversarial, Plain, config
from support import differences, exact_state

from dream_trainer import (
    EarlyStopping,
    GradientAccumulationScheduler,
    LightningModuleTrainer,
    Unfreeze,
    Unfreezing,
)
from dream_trainer.errors import ConfigError

pytestmark = [
    pytest.mark.may_leave("rng"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]


class Scheduled(Plain):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def run(root: Path, name: str, **training: Any) -> LightningModuleTrainer:
    callbacks = {
        "stopping": EarlyStopping("val_loss", patience=1, min_delta=0.05),
        "unfreeze": Unfreeze({"module.net.0": Unfreezing(step=4, lr_scale=0.1)}),
        "by_epoch": GradientAccumulationScheduler({0: 3, 1: 1}),
    }
    made = config(root, name, training={"n_epochs": 9, **training}, callbacks=callbacks)
    trainer = LightningModuleTrainer(made, Scheduled())
    trainer.fit()
    return trainer


def test_a_module_is_steered_and_goes_on_exactly(tmp_path: Path) -> None:
    straight = run(tmp_path, "straight")
    assert str(straight.stop_reason).startswith("val_loss has not got 0.05 better than ")
    assert straight.global_step == 2 + 6 * (straight.current_epoch - 1)
    (optimizer,) = straight.components.optimizers.values()
    first, second = (group["lr"] for group in optimizer.param_groups)
    assert second == pytest.approx(0.1 * first)
    for cut in (3, 5):
        run(tmp_path, f"cut-{cut}", max_steps=cut)
        again = run(tmp_path, f"cut-{cut}")
        assert differences(exact_state(straight), exact_state(again)) == [], cut


def test_manual_optimization_accumulates_by_itself(tmp_path: Path) -> None:
    callbacks = {"by_epoch": GradientAccumulationScheduler({0: 3})}
    trainer = LightningModuleTrainer(config(tmp_path, callbacks=callbacks), Adversarial())
    with pytest.raises(ConfigError, match="accumulates gradients by itself"):
        trainer.fit()
