"""torchmetrics: train and validation apart, computed once an epoch, exact over restarts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import Points, TinyTrainer, tiny
from torchmetrics import MeanMetric, MetricCollection, SumMetric

from dream_trainer.callbacks import MetricLogger

# A run seeds the global streams.
pytestmark = pytest.mark.may_leave("rng")


class Counts(TinyTrainer):
    """Sums the indices it sees, so that the right result is known."""

    def configure_metrics(self) -> None:
        self.seen_sum = SumMetric()

    def compute_loss(self, batch: Any, batch_idx: int) -> Any:
        self.seen_sum.update(batch["index"])
        return super().compute_loss(batch, batch_idx)


def rows(trainer: Any, name: str) -> list[tuple[int, int, float]]:
    lines = (trainer.run_directory / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return [(row["step"], row["epoch"], row[name]) for row in found if name in row]


@pytest.mark.parametrize("val_every", [None, 1, 4])
def test_train_and_validation_do_not_mix(tmp_path: Path, val_every: int | None) -> None:
    trainer = tiny(tmp_path, Counts, val_every_n_steps=val_every, num_sanity_val_steps=2)
    trainer.fit()
    train, val = float(sum(range(24))), float(sum(range(10)))
    assert rows(trainer, "train/seen_sum") == [(6, 0, train), (12, 1, train)]
    steps = {6, 12} | (set(range(val_every, 13, val_every)) if val_every else set())
    assert [(s, v) for s, _, v in rows(trainer, "val/seen_sum")] == [
        (s, val) for s in sorted(steps)
    ]


@pytest.mark.parametrize("cut", [1, 2, 5, 6, 8])
def test_a_resume_inside_an_epoch_counts_every_sample_once(tmp_path: Path, cut: int) -> None:
    tiny(tmp_path, Counts, max_steps=cut).fit()
    trainer = tiny(tmp_path, Counts)
    trainer.fit()
    total = float(sum(range(24)))
    assert rows(trainer, "train/seen_sum") == [(6, 0, total), (12, 1, total)]


def test_collections_and_vectors_are_written_by_part(tmp_path: Path) -> None:
    class Parts(TinyTrainer):
        def configure_metrics(self) -> None:
            self.errors = MetricCollection({"sum": SumMetric(), "mean": MeanMetric()})
            self.unused = SumMetric()

        def compute_loss(self, batch: Any, batch_idx: int) -> Any:
            self.errors.update(torch.ones(1))
            return super().compute_loss(batch, batch_idx)

    tiny(tmp_path, Parts, max_steps=4).fit()
    trainer = tiny(tmp_path, Parts, n_epochs=1)
    trainer.fit()
    assert rows(trainer, "train/errors/sum") == [(6, 0, 6.0)]
    assert rows(trainer, "val/errors/mean") == [(6, 0, 1.0)]
    assert "unused" not in (trainer.run_directory / "metrics.jsonl").read_text()


def test_the_log_does_not_depend_on_when_it_is_flushed(tmp_path: Path) -> None:
    logs = []
    for every in (1, 5, 1000):
        logger = MetricLogger(flush_every_n_rows=every)
        trainer = tiny(tmp_path, Counts, experiment=f"every-{every}", callbacks={"metrics": logger})
        trainer.fit()
        logs.append((trainer.run_directory / "metrics.jsonl").read_bytes())
    assert logs[0] == logs[1] == logs[2]


def test_every_n_steps_thins_the_steps_and_nothing_else(tmp_path: Path) -> None:
    trainer = tiny(tmp_path, Counts, callbacks={"metrics": MetricLogger(every_n_steps=4)})
    trainer.fit()
    assert [step for step, _, _ in rows(trainer, "train/loss")] == [4, 8, 12]
    assert [step for step, _, _ in rows(trainer, "val/loss")] == [6, 12]


def test_a_logged_loss_is_the_mean_over_the_samples_of_its_window(tmp_path: Path) -> None:
    class AtRest(TinyTrainer):
        def configure_dataloaders(self) -> Any:
            train, _ = super().configure_dataloaders()
            return train, None

    trainer = tiny(
        tmp_path, AtRest, lr=0.0, num_samples=14, n_epochs=1, gradient_accumulation_steps=4
    )
    trainer.fit()
    points = Points(14)
    made = trainer.named_models()["net"](points.x.float())
    expected = (made - points.y.float()).square().mean().item()
    ((step, _, loss),) = rows(trainer, "train/loss")
    assert step == 1
    assert loss == pytest.approx(expected, rel=1e-6)


def test_the_learning_rate_is_the_one_the_step_used(tmp_path: Path) -> None:
    trainer = tiny(tmp_path, n_epochs=1, lr=0.05)
    trainer.fit()
    rates = [value for _, _, value in rows(trainer, "lr/net")]
    assert rates == [0.05] * 3 + [0.05 * 0.7] * 3


def test_a_tensor_changed_after_it_was_logged_is_logged_as_it_was(tmp_path: Path) -> None:
    class InPlace(TinyTrainer):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            value = torch.tensor(1.0)
            self.log_dict({"value": value})
            value.add_(1)
            return super().training_step(batch, batch_idx)

    trainer = tiny(tmp_path, InPlace, n_epochs=1)
    trainer.fit()
    assert {value for _, _, value in rows(trainer, "value")} == {1.0}


def test_a_weight_counts_in_logged_means_and_in_validation(tmp_path: Path) -> None:
    class Weighted(TinyTrainer):
        def compute_loss(self, batch: Any, batch_idx: int) -> Any:
            weight = batch["index"].sum().double() + 1  # a tensor, as a count of tokens is
            loss = super().compute_loss(batch, batch_idx)
            return {"loss": loss, "weight": weight, "of_batch": batch["index"].double().mean()}

    trainer = tiny(tmp_path, Weighted, n_epochs=1, gradient_accumulation_steps=2)
    trainer.fit()

    ((_, _, validated),) = rows(trainer, "val/of_batch")
    batches = [b["index"].double() for b in trainer.val_dataloader]
    weights = [float(b.sum() + 1) for b in batches]
    means = [float(b.mean()) for b in batches]
    assert validated == sum(m * w for m, w in zip(means, weights, strict=True)) / sum(weights)
    assert rows(trainer, "val/weight") == rows(trainer, "train/weight") == []
    assert len(rows(trainer, "train/of_batch")) == 3


def test_a_run_that_ends_inside_an_epoch_and_saves_nothing_logs_its_last_steps(
    tmp_path: Path,
) -> None:
    rows = []

    class InMemory:
        def log_metrics(self, metrics: Any, step: int) -> None:
            rows.append(step)

        def finalize(self, status: str) -> None:
            pass

    tiny(tmp_path, enable=False, max_steps=4, loggers={"memory": InMemory()}).fit()
    assert rows == [1, 2, 3, 4]
