"""Validation counts each sample once, on any number of ranks, and whatever a metric keeps."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import LAYOUTS, BlocksTrainer, Layout, in_double, laid_out
from support import Points, run_ranks
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics import (
    CatMetric,
    MaxMetric,
    MeanMetric,
    Metric,
    MetricCollection,
    MinMaxMetric,
    PearsonCorrCoef,
    SumMetric,
)
from torchmetrics.classification import BinaryAUROC, BinaryPrecision, BinaryRecall
from torchmetrics.wrappers import ClasswiseWrapper

pytestmark = [pytest.mark.distributed, pytest.mark.may_leave("rng")]


class Batches(Metric):
    """Keeps a tensor per batch, reduced by nobody: ranks with a filler have fewer."""

    full_state_update = False
    batches: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("batches", default=[], dist_reduce_fx=None)

    def update(self, values: Tensor) -> None:
        self.batches.append(values.double().sum())

    def compute(self) -> Tensor:
        return torch.stack(self.batches).sum()


class PerHalf(Metric):
    """Samples with even and with odd index, as a vector."""

    full_state_update = False
    counts: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("counts", default=torch.zeros(2), dist_reduce_fx="sum")

    def update(self, index: Tensor) -> None:
        self.counts += torch.bincount(index % 2, minlength=2)

    def compute(self) -> Tensor:
        return self.counts


class Measured(BlocksTrainer):
    def configure_metrics(self) -> None:
        self.index_sum = SumMetric()
        self.indices = CatMetric()
        self.mean = MeanMetric()
        self.auroc = BinaryAUROC()
        self.both = MetricCollection(
            {"p": BinaryPrecision(), "r": BinaryRecall(), "auroc": BinaryAUROC()}
        )
        self.correlation = PearsonCorrCoef()
        self.batches = Batches()
        self.extremes = MinMaxMetric(MaxMetric())
        self.halves = ClasswiseWrapper(PerHalf(), labels=["even", "odd"], prefix="n_")
        self.ratio = self.index_sum / self.index_sum
        self.never = SumMetric()

    def compute_loss(self, batch: Any, batch_idx: int) -> Any:
        made, index = self.net(batch["x"])[:, 0].detach(), batch["index"]
        target = (batch["y"][:, 0] > 0).long()
        for metric in (self.indices, self.batches, self.halves):
            metric.update(index)
        self.mean.update(made, index + 1)
        self.auroc.update(made.sigmoid(), target)
        self.both.update(made.sigmoid(), target)
        self.correlation.update(made, batch["y"][:, 0])
        self.extremes.update(made)
        return super().compute_loss(batch, batch_idx)


#: Fewer than ranks; one batch with an uneven rest; more than one batch.
NUMBERS = [1, 2, 5, 26]


def validated(root: Path, layout: Layout) -> list[dict[str, float]]:
    in_double()
    trainer = laid_out(root, layout, Measured, samples_per_batch=12)
    results = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # too few samples for a curve
        for number in NUMBERS:
            loaders = (DataLoader(Points(number, seed=6), trainer.config.batch_size) for _ in "12")
            # Twice: the second one must count nothing that the first one merged.
            first, second = (trainer.test(loader) for loader in loaders)
            assert repr(first) == repr(second)
            results.append(first)
    return results


@pytest.fixture(scope="module")
def on_one_rank(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    root = tmp_path_factory.mktemp("one-rank")
    (results,) = run_ranks(1, validated, root, LAYOUTS["single"])
    for number, of_number in zip(NUMBERS, results, strict=True):
        assert of_number["test/index_sum"] == sum(range(number))
        assert of_number["test/halves/n_odd"] == number // 2
        assert "test/never" not in of_number
    return results


@pytest.mark.parametrize("layout", ["ddp", "ddp of three", "fsdp", "tp", "hsdp", "fsdp-tp"])
def test_every_kind_of_metric_is_the_same_on_any_ranks(
    tmp_path: Path, on_one_rank: list[dict[str, float]], layout: str
) -> None:
    laid = LAYOUTS.get(layout) or Layout(layout, 3, {"dp_replicate": 3})
    ranks = run_ranks(laid.size, validated, tmp_path, laid)
    assert [repr(results) for results in ranks] == [repr(ranks[0])] * laid.size
    for number, single, here in zip(NUMBERS, on_one_rank, ranks[0], strict=True):
        expected = in_any_order(single)
        if number < 24:  # torchmetrics' own formula is 0 / 0 for a rank with one sample
            expected.pop("test/correlation")
        found = {name: value for name, value in in_any_order(here).items() if name in expected}
        assert found == pytest.approx(expected, rel=1e-12, nan_ok=True), number


def in_any_order(results: dict[str, float]) -> dict[str, float]:
    """The concatenated indices come rank by rank."""
    names = sorted(name for name in results if name.startswith("test/indices"))
    ordered = sorted(results[name] for name in names)
    return results | dict(zip(names, ordered, strict=True))
