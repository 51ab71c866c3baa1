"""A LightningModule is tested on any checkpoint of its run, predicts to disk, and is exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from modules import Plain, config, points
from support import differences, exact_state
from torch.utils.data import DataLoader

from dream_trainer import PredictionWriter, read_predictions
from dream_trainer.errors import ConfigError
from dream_trainer.lightning_modules import LightningModuleTrainer

pytestmark = [
    pytest.mark.may_leave("rng"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
]


class Module(Plain):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.example_input_array = points(5, 3)[:][0]

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test/loss", (self(batch[0]) - batch[1]).square().mean())

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self(batch[0])


def loader() -> DataLoader[Any]:
    return DataLoader(points(4, 6), batch_size=4)


def test_on_any_checkpoint_and_then_on(tmp_path: Path) -> None:
    straight = LightningModuleTrainer(config(tmp_path, "straight"), Module())
    straight.fit()
    writer = PredictionWriter(tmp_path / "p")
    options = config(tmp_path, callbacks={"writer": writer, "progress": None})
    whole = options.training_parameters.n_epochs
    options.training_parameters.n_epochs = 2
    options.checkpoint_parameters.keep_last = 9
    trainer = LightningModuleTrainer(options, Module())
    trainer.fit()
    first = trainer.checkpointer.store.paths()[0].name
    results = [trainer.test(loader(), checkpoint=given) for given in (first, "last", None)]
    assert results[0] != results[1] == results[2]
    trainer.predict(loader(), checkpoint=first, return_predictions=False)
    trainer.validate(checkpoint=first)
    program = torch.export.load(trainer.export(tmp_path / "first.pt2", checkpoint=first)).module()
    made = program(points(4, 6)[:][0])
    torch.testing.assert_close(made, read_predictions(tmp_path / "p").together())
    trainer.config.training_parameters.n_epochs = whole
    trainer.fit()
    # What it has logged last can be read afterwards, as in Lightning; all else is as it was.
    places = ("/callbacks/lightning_module", "/trainer/metrics/journal")
    latest = [f"{place}/latest/test/loss" for place in places]
    assert differences(exact_state(straight), exact_state(trainer)) == latest


def test_a_module_without_an_example_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="export_example does not say on which"):
        LightningModuleTrainer(config(tmp_path), Plain()).export(tmp_path / "net.pt2")
