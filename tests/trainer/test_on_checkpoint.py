"""Evaluated on the weights of any checkpoint, a trainer then goes on as if nothing had been."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import LAYOUTS, BlocksTrainer, laid_out
from support import Points, TinyTrainer, differences, exact_state, run_ranks, tiny, weights
from torch import nn
from torch.utils.data import DataLoader

from dream_trainer import EMA, SWA, Callback, Unfreeze, Unfreezing
from dream_trainer.errors import CheckpointError, ConfigError, StateError

pytestmark = pytest.mark.may_leave("rng")

MONITORED = {"monitor": "val/loss", "keep_top_k": 2, "keep_last": 1}


class Rising(TinyTrainer):
    """Learns backwards from its third step on, so that the best checkpoint is not the last."""

    def configure_models(self) -> None:
        self.net = nn.Sequential(
            nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(self.config.dropout), nn.Linear(8, 1)
        )

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.compute_loss(batch, batch_idx)
        self.backward(loss if self.global_step < 12 else -loss)
        self.step()
        return loss

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(batch["x"])


def loader() -> DataLoader[Any]:
    return DataLoader(Points(10, seed=6), batch_size=4)


def fitted(root: Path, kind: type[TinyTrainer] = Rising, **options: Any) -> Any:
    trainer = tiny(root, kind, **{"n_epochs": 4, "dropout": 0.2, **MONITORED} | options)
    trainer.fit()
    return trainer


def names(trainer: Any) -> dict[str, Path]:
    """The best checkpoint and the last one, which differ."""
    store = trainer.checkpointer.store
    best, last = store.best("min", "val/loss"), store.newest()
    assert best.path != last.path
    return {"best": best.path, "last": last.path}


def names_of(trainer: Any) -> list[Path]:
    """The checkpoints of a run, the newest last."""
    return sorted(trainer.run_directory.glob("checkpoints/step-*"))


def test_a_test_on_best_is_that_of_a_run_which_resumed_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = fitted(tmp_path)
    own, live = exact_state(trainer), trainer.test(loader())
    found = names(trainer)
    asked: dict[str, str | Path] = {
        "best": found["best"],
        "last": found["last"],
        found["best"].name: found["best"],  # a checkpoint of this run, by its name
        str(found["best"]): found["best"],
        str(found["best"].parent / "best"): found["best"],  # the link
        str(trainer.run_directory): found["last"],
    }
    results = {}
    for given, path in asked.items():
        capsys.readouterr()
        results[given] = trainer.test(loader(), checkpoint=given)
        told = capsys.readouterr().out
        assert re.search(rf"^test on .*{path.name}, val/loss \d", told, re.MULTILINE), told
        resumed = tiny(
            tmp_path, Rising, experiment="another", resume=str(path), enable=False, **MONITORED
        )
        assert resumed.test(loader()) == results[given], given
        assert differences(own, exact_state(trainer)) == []
    assert results["best"]["test/loss"] < results["last"]["test/loss"]
    assert results["last"] == live == trainer.test(loader())


def test_validate_and_predict_take_a_checkpoint_too(tmp_path: Path) -> None:
    trainer = fitted(tmp_path)
    best = names(trainer)["best"]
    resumed = tiny(tmp_path, Rising, experiment="another", resume=str(best), enable=False)
    assert trainer.validate("best") == resumed.validate()
    made = torch.cat(trainer.predict(loader(), checkpoint="best"))
    assert torch.equal(made, torch.cat(resumed.predict(loader())))
    assert trainer.predict(loader(), checkpoint="best", return_predictions=False) == []


def test_a_fit_after_a_test_on_best_goes_on_to_the_bit(tmp_path: Path) -> None:
    straight = fitted(tmp_path, experiment="straight", n_epochs=6)
    trainer = fitted(tmp_path, n_epochs=4)
    trainer.test(loader(), checkpoint="best")
    trainer.config.training_parameters.n_epochs = 6
    trainer.fit()
    assert differences(exact_state(straight), exact_state(trainer)) == []


def test_a_fresh_trainer_that_was_tested_on_best_still_continues(tmp_path: Path) -> None:
    straight = fitted(tmp_path, experiment="straight", n_epochs=6)
    fitted(tmp_path)
    again = tiny(tmp_path, Rising, n_epochs=6, dropout=0.2, **MONITORED)
    again.test(loader(), checkpoint="best")
    assert again.global_step == 0
    again.fit()
    assert again.is_resumed
    assert differences(exact_state(straight), exact_state(again)) == []


class LooksAtBest(Callback):
    """Tests on the best checkpoint and on the live weights after every epoch."""

    def __init__(self, call: Callable[[Any], Any]) -> None:
        self.call = call
        self.results: list[Any] = []

    def post_epoch(self, trainer: Any) -> None:
        if trainer.current_epoch > 1:
            self.results.append(self.call(trainer))


def test_a_callback_may_test_on_best_in_the_middle_of_a_run(tmp_path: Path) -> None:
    plain = fitted(tmp_path, experiment="plain", every_n_steps=1)
    tests = LooksAtBest(lambda t: (t.test(loader(), checkpoint="best"), t.test(loader())))
    trainer = fitted(tmp_path, callbacks={"tests": tests}, every_n_steps=1)
    assert differences(exact_state(plain), exact_state(trainer)) == []
    (first_best, first_live), (last_best, last_live) = tests.results
    assert first_best["test/loss"] < first_live["test/loss"]
    assert last_best["test/loss"] < last_live["test/loss"]
    logs = [(one.run_directory / "metrics.jsonl").read_bytes() for one in (plain, trainer)]
    assert logs[0] == logs[1]


@pytest.mark.parametrize("hook", ["pre_validation_step", "post_setup"])
def test_where_it_would_disturb_it_is_refused(tmp_path: Path, hook: str) -> None:
    callback = Callback()
    callback = type("Disturbs", (Callback,), {hook: lambda self, trainer, *_: trainer.validate()})()
    with pytest.raises(RuntimeError, match=r"would disturb it|this trainer is running"):
        fitted(tmp_path, callbacks={"disturbs": callback}, n_epochs=1)


class Average(Callback):
    """An average of the weights in place of them while a test is under way."""

    holds_weights = True

    def __init__(self) -> None:
        self.average: dict[str, Any] = {}

    def post_optimizer_step(self, trainer: Any, optimizer: Any) -> None:
        own = trainer.named_models()["net"].state_dict()
        for name, value in own.items():
            self.average[name] = (self.average.get(name, value.clone()) + value) / 2

    def pre_test_epoch(self, trainer: Any) -> None:
        model = trainer.named_models()["net"]
        self.own = copy.deepcopy(model.state_dict())
        model.load_state_dict(self.average)

    def post_test_epoch(self, trainer: Any, results: Any) -> None:
        trainer.named_models()["net"].load_state_dict(self.own)

    def state_dict(self) -> dict[str, Any]:
        return {"average": dict(self.average)}

    def load_state_dict(self, state: Any) -> None:
        self.average = dict(state["average"])


def test_weights_that_a_callback_holds_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    trainer = fitted(tmp_path, callbacks={"average": Average()})
    own, best = exact_state(trainer), names(trainer)["best"]
    result = trainer.test(loader(), checkpoint="best")
    resumed = tiny(
        tmp_path, Rising, experiment="b", resume=str(best), callbacks={"average": Average()}
    )
    assert resumed.test(loader()) == result
    assert result != trainer.test(loader())
    assert differences(own, exact_state(trainer)) == []


@pytest.mark.parametrize("average", [EMA(0.9), SWA(start_epoch=0)], ids=["EMA", "SWA"])
@pytest.mark.parametrize("form", ["checkpoint", "file"])
def test_an_average_is_not_in_place_of_weights_that_come_without_one(
    tmp_path: Path, average: Callback, form: str
) -> None:
    plain = fitted(tmp_path, experiment="plain", n_epochs=1)
    path = names_of(plain)[-1]
    if form == "file":
        path = plain.export(tmp_path / "plain.safetensors")
    expected = plain.test(loader())
    trainer = fitted(tmp_path, n_epochs=2, callbacks={"average": average})
    own = exact_state(trainer)
    assert trainer.test(loader(), checkpoint=path) == expected
    assert differences(own, exact_state(trainer)) == []


# ---------------------------------------------------------------------- what cannot be had


def test_best_needs_a_monitor_and_a_value(tmp_path: Path) -> None:
    unmonitored = fitted(tmp_path, monitor=None, n_epochs=1)
    with pytest.raises(ConfigError, match=r"'best' is judged by checkpoint_parameters.monitor"):
        unmonitored.test(loader(), checkpoint="best")
    unvalued = tiny(tmp_path, Rising, monitor="val/loss")
    with pytest.raises(
        ConfigError, match=r"no checkpoint in .* has a value of val/loss; in .*step-"
    ):
        unvalued.test(loader(), checkpoint="best")
    with pytest.raises(ConfigError, match="there is no checkpoint in"):
        tiny(tmp_path, experiment="empty").test(loader(), checkpoint="last")


def test_an_unknown_name_lists_what_there_is(tmp_path: Path) -> None:
    trainer = fitted(tmp_path)
    own = exact_state(trainer)
    there = r"'bset' is neither 'best', 'last' nor a path; in .* is: step-\d+, step-\d+"
    with pytest.raises(ConfigError, match=there):
        trainer.test(loader(), checkpoint="bset")
    assert differences(own, exact_state(trainer)) == []


@pytest.mark.parametrize("part", ["*.distcp", "manifest.json"])
def test_a_damaged_best_is_an_error_and_not_the_second_best(tmp_path: Path, part: str) -> None:
    trainer = fitted(tmp_path)
    best = names(trainer)["best"]
    (file,) = best.glob(part)
    file.write_bytes(b"oops" + file.read_bytes()[4:])
    with pytest.raises(CheckpointError, match=r'It was the best\. Take "last", or another'):
        trainer.test(loader(), checkpoint="best")
    assert best.exists()  # nothing is renamed
    assert trainer.test(loader(), checkpoint="last") == trainer.test(loader())


def test_a_checkpoint_of_another_model_is_refused_and_nothing_is_changed(tmp_path: Path) -> None:
    other = fitted(tmp_path, TinyTrainer, experiment="other", n_epochs=1)
    trainer = fitted(tmp_path)
    own = exact_state(trainer)
    with pytest.raises(StateError, match=r"models.net.1.weight: missing in the state"):
        trainer.test(loader(), checkpoint=other.run_directory)
    assert differences(own, exact_state(trainer)) == []


def test_a_file_of_weights_is_a_path_too(tmp_path: Path) -> None:
    trainer = fitted(tmp_path)
    model = copy.deepcopy(trainer.named_models()["net"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.save(model.state_dict(), tmp_path / "zero.pt")
    made = trainer.predict(loader(), checkpoint=tmp_path / "zero.pt")
    assert not torch.cat(made).any()
    assert torch.cat(trainer.predict(loader())).any()


def test_frozen_weights_that_checkpoints_leave_out_stay_left_out(tmp_path: Path) -> None:
    class Frozen(Rising):
        def configure_models(self) -> None:
            super().configure_models()
            self.net[0].requires_grad_(False)

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW([p for p in self.net.parameters() if p.requires_grad], lr=0.05)

    trainer = fitted(tmp_path, Frozen, save_frozen=False)
    assert "0.weight" not in trainer.state_dict()["models"]["net"]
    own = exact_state(trainer)
    trainer.test(loader(), checkpoint="best")
    assert differences(own, exact_state(trainer)) == []


def test_a_checkpoint_that_leaves_out_what_was_trained_since_needs_a_new_trainer(
    tmp_path: Path,
) -> None:
    def made() -> Any:
        callbacks = {"unfreeze": Unfreeze({"net.0": Unfreezing(epoch=1)})}
        options = {"n_epochs": 2, "every_n_steps": 3, "keep_last": 9, "save_frozen": False}
        return tiny(tmp_path, Rising, callbacks=callbacks, **options)

    trainer = made()
    trainer.fit()
    own, first = exact_state(trainer), names_of(trainer)[0]
    with pytest.raises(StateError, match="trained what it leaves out: then make a new one"):
        trainer.test(loader(), checkpoint=first)
    assert differences(own, exact_state(trainer)) == []
    assert made().test(loader(), checkpoint=first)


# ---------------------------------------------------------------------- on ranks


class RisingBlocks(BlocksTrainer):
    def configure_models(self) -> None:
        super().configure_models()
        self.norm = nn.BatchNorm1d(3, affine=False)  # statistics that differ by rank

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        made = self.compute_loss(batch, batch_idx)
        loss = made["loss"]
        self.backward(loss if self.global_step < 12 else -9 * loss, made["weight"])
        self.step()
        return loss

    def compute_loss(self, batch: Any, batch_idx: int) -> Any:
        return super().compute_loss({**batch, "x": self.norm(batch["x"])}, batch_idx)


def _on_ranks(root: Path, layout: str, other: str | None) -> dict[str, Any]:
    options = {"n_epochs": 4, "enable": True, **MONITORED}
    trainer = laid_out(root, layout, RisingBlocks, **options)
    trainer.fit()
    own, before = exact_state(trainer), weights(trainer)
    best = trainer.checkpointer.store.best("min", "val/loss").path
    results = {"best": trainer.test(loader(), checkpoint="best"), "live": trainer.test(loader())}
    resumed = laid_out(root, layout, RisingBlocks, experiment="r", resume=str(best))
    results["resumed"] = resumed.test(loader())
    assert differences(before, weights(trainer)) == []
    if other is not None:
        path = root / "default/default" / other
        last = str(sorted((path / "checkpoints").glob("step-*"))[-1])
        there = laid_out(root, layout, RisingBlocks, experiment="r", resume=last).test(loader())
        assert trainer.test(loader(), checkpoint=path) == there
    trainer.test(loader(), checkpoint="best")
    assert differences(own, exact_state(trainer)) == []
    trainer.config.training_parameters.n_epochs = 5
    trainer.fit()
    straight = laid_out(
        root, layout, RisingBlocks, **options | {"n_epochs": 5, "experiment": f"{layout}-straight"}
    )
    straight.fit()
    assert differences(exact_state(straight), exact_state(trainer)) == []
    return results


@pytest.mark.distributed
def test_on_any_ranks_and_from_any_others(tmp_path: Path) -> None:
    other = None
    for layout in ("ddp", "fsdp", "tp"):
        ranks = run_ranks(2, _on_ranks, tmp_path, layout, other)
        assert ranks[0] == ranks[1]
        results = ranks[0]
        assert results["best"] == results["resumed"]
        assert results["best"]["test/loss"] < results["live"]["test/loss"]
        other = LAYOUTS[layout].name
