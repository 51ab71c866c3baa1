"""What ``log(..., reduce=, weight=)`` promises: over batches of a step, validations and ranks."""

from __future__ import annotations

import json
import math
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from support import TinyTrainer, run_ranks, tiny

from dream_trainer import Callback
from dream_trainer.errors import ConfigError
from dream_trainer.metrics import LoggedValues
from dream_trainer.reductions import ReducedValues, merged, parts_of


class Hooked(Callback):
    """Logs from a hook, after the step."""

    def post_train_step(self, trainer: Any, result: Any, batch: Any, batch_idx: int) -> None:
        trainer.log("hook/batches", 1, reduce="sum")


class Reducing(TinyTrainer):
    """Every reduction, of the samples that a batch has."""

    def compute_loss(self, batch: Any, batch_idx: int) -> Any:
        index = batch["index"].double()
        phase = "train" if torch.is_grad_enabled() else "val"
        self.log(f"{phase}/num", len(index), reduce="sum")
        self.log(f"{phase}/highest", index.max(), reduce="max")
        self.log(f"{phase}/lowest", index.min(), reduce="min")
        self.log(f"{phase}/mean", index.mean(), weight=len(index))
        return super().compute_loss(batch, batch_idx)


def rows_of(trainer: Any) -> list[dict[str, Any]]:
    text = (trainer.run_directory / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def reduced_run(root: Path, **options: Any) -> tuple[list[dict[str, Any]], list[list[int]]]:
    options = {"n_epochs": 1, "callbacks": {"hooked": Hooked()}, **options}
    trainer = tiny(root, Reducing, **options)
    trainer.fit()
    return rows_of(trainer), trainer.seen


def assert_reduced(rows: list[dict[str, Any]], windows: list[list[int]], batches: int) -> None:
    steps = [row for row in rows if "train/num" in row]
    assert len(steps) == len(windows)
    for row, window in zip(steps, windows, strict=True):
        assert row["train/num"] == len(window)
        assert row["train/highest"] == max(window)
        assert row["train/lowest"] == min(window)
        assert row["train/mean"] == pytest.approx(sum(window) / len(window))
        assert row["hook/batches"] == batches
    (val,) = [row for row in rows if "val/num" in row]
    assert [val[f"val/{name}"] for name in ("num", "lowest", "highest", "mean")] == [10, 0, 9, 4.5]


def test_values_are_reduced_over_the_batches_of_a_step_and_of_a_validation(tmp_path: Path) -> None:
    rows, seen = reduced_run(tmp_path, gradient_accumulation_steps=3)
    assert_reduced(rows, [[*chain(*seen[:3])], [*chain(*seen[3:])]], batches=3)


@pytest.mark.distributed
@pytest.mark.parametrize("sharded", [False, True])
def test_values_are_reduced_over_ranks(tmp_path: Path, sharded: bool) -> None:
    def rank() -> tuple[list[dict[str, Any]], list[list[int]]]:
        layout = {"dp_shard": 2, "dp_replicate": 1} if sharded else {}
        return reduced_run(tmp_path, gradient_accumulation_steps=3, **layout)

    (rows, one), (_, other) = run_ranks(2, rank)
    assert_reduced(rows, [[*chain(*one, *other)]], batches=6)


@pytest.mark.distributed
def test_what_one_rank_alone_logs_is_in_the_row(tmp_path: Path) -> None:
    class OnOne(TinyTrainer):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.backward(self.compute_loss(batch, batch_idx))
            self.step()
            if self.world.rank == 1 and batch_idx == 1:
                self.log("only/here", 5, reduce="sum")

    def rank() -> list[dict[str, Any]]:
        trainer = tiny(tmp_path, OnOne, n_epochs=1, has_validation=False, callbacks={"lr": None})
        trainer.fit()
        return rows_of(trainer)

    assert run_ranks(2, rank)[0] == [{"step": 2, "epoch": 0, "only/here": 5}]


def test_a_name_has_one_reduction(tmp_path: Path) -> None:
    class Both(TinyTrainer):
        def compute_loss(self, batch: Any, batch_idx: int) -> Any:
            self.log("both", 1)
            self.log("both", 1, reduce="max")
            return super().compute_loss(batch, batch_idx)

    with pytest.raises(ValueError, match="both: logged as a mean, and as a sum, max or min"):
        tiny(tmp_path, Both, n_epochs=1).fit()
    with pytest.raises(ConfigError, match="both comes from two places"):
        tiny(tmp_path, Both, experiment="other").validate()
    trainer = tiny(tmp_path)
    with pytest.raises(ValueError, match='not "mean", "sum", "max" or "min"'):
        trainer.log("x", 1, reduce="median")
    with pytest.raises(ValueError, match="a weight counts in means, and x is a sum"):
        trainer.log("x", 1, reduce="sum", weight=2)
    trainer.log("x", 1, reduce="sum")
    with pytest.raises(ValueError, match="x is logged as a sum and as a max"):
        trainer.log("x", 1, reduce="max")


@pytest.mark.parametrize("reduce", ["max", "min", "sum"])
def test_a_nan_shows_wherever_it_was(reduce: str) -> None:
    for values in ([math.nan, 1.0], [1.0, math.nan]):
        inside = ReducedValues()
        for value in values:
            inside.add("x", value, 1.0, reduce)
        assert math.isnan(merged(parts_of([inside]))["x"])
        apart = [ReducedValues(), ReducedValues()]
        for one, value in zip(apart, values, strict=True):
            one.add("x", value, 1.0, reduce)
        assert math.isnan(merged(parts_of(apart))["x"])


def test_what_a_window_has_logged_so_far_is_state() -> None:
    logged = LoggedValues()
    logged.add({"mean": 1.0}, weight=2.0)
    logged.add_reduced("sum", 3, "sum")
    copy = LoggedValues()
    copy.load_state_dict(logged.state_dict())
    for one in (logged, copy):
        one.add_reduced("sum", torch.tensor(4.0), "sum")
        assert one.take() == [("mean", 1.0, 2.0)]
        assert merged(parts_of([one.take_reduced()])) == {"sum": 7.0}
        assert one.reduced is None
