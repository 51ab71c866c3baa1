"""Averages of a LightningModule's weights: those of Lightning's own callback, and exact."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import WeightAveraging
from modules import Plain, trained
from support import differences, exact_state, flat
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dream_trainer import EMA, SWA, Callback, export_checkpoint

pytestmark = pytest.mark.may_leave("rng")  # of Lightning's own runs


class Normed(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(self.net[0], nn.BatchNorm1d(8), self.net[1], self.net[2])


def test_the_average_is_lightnings(tmp_path: Path) -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    theirs = Plain()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lightning.Trainer(
            max_epochs=2,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            # Theirs begins with the weights after the first step.
            callbacks=[WeightAveraging(multi_avg_fn=get_ema_multi_avg_fn(0.9))],
        ).fit(theirs)
    ema = EMA(0.9, start_step=1)
    trainer = trained(tmp_path, Plain, callbacks={"ema": ema}, training={"n_epochs": 2})
    mine = {name.removeprefix("module."): value for name, value in ema.average().items()}
    assert flat(mine) == flat(theirs.state_dict())
    file = export_checkpoint(trainer.run_directory, tmp_path / "ema.ckpt", weights="ema")
    loaded = Plain.load_from_checkpoint(file, map_location="cpu")
    assert flat(loaded.state_dict()) == flat(theirs.state_dict())


def test_a_module_is_validated_with_the_average_and_resumes_exactly(tmp_path: Path) -> None:
    seen: list[bool] = []

    class Watch(Callback):
        def pre_validation_step(self, trainer: Any, batch: Any, batch_idx: int) -> None:
            own = {f"module.{n}": p for n, p in trainer.module.named_parameters()}
            seen.append(flat(own) == flat(trainer.callbacks["ema"].average()))

    def run(experiment: str, n_epochs: int) -> Any:
        callbacks = {
            "ema": EMA(0.9),
            "swa": SWA(start_epoch=1, learning_rate=0.01, evaluate_with="model"),
            "watch": Watch(),
        }
        options = {"training": {"n_epochs": n_epochs}, "callbacks": callbacks}
        return trained(tmp_path, Normed, name=experiment, **options)

    straight = run("straight", 3)
    assert all(seen)
    run("resumed", 2)
    resumed = run("resumed", 3)
    assert differences(exact_state(resumed), exact_state(straight)) == []
    average = straight.callbacks["swa"].average()
    assert "module.net.1.running_mean" in average
    assert not torch.equal(
        average["module.net.1.running_mean"], straight.module.net[1].running_mean
    )
    logs = [(one.run_directory / "metrics.jsonl").read_text() for one in (straight, resumed)]
    assert logs[0] == logs[1]
