from __future__ import annotations

import math
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor

from dream_trainer import metrics
from dream_trainer.host_values import to_host
from dream_trainer.metrics import LoggedValues, merge_ranks, totals


def logged(result: object, num_samples: int | None = None) -> list[tuple[str, Any, Any]]:
    values = LoggedValues()
    values.add_result(result, num_samples, "train/")
    return values.take()


def test_the_numbers_of_what_a_step_returns_are_logged() -> None:
    result = {
        "loss": torch.tensor(1.0),
        "one": torch.ones(1, 1),
        "lr": 0.5,
        "count": 3,
        "logits": torch.ones(2),
        "is_done": True,
        "name": "x",
        "nothing": None,
    }
    names = ["train/loss", "train/one", "train/lr", "train/count"]
    assert [name for name, _, _ in logged(result)] == names
    assert logged(MappingProxyType(result)) == logged(result)
    assert logged(torch.tensor(2.0)) == [("train/loss", torch.tensor(2.0), 1.0)]
    assert logged(None) == logged(3.0) == logged([1.0]) == []


def test_a_result_counts_by_its_weight_or_its_samples() -> None:
    assert logged({"loss": 1.0}, 8) == [("train/loss", 1.0, 8.0)]
    assert logged({"loss": 1.0, "weight": 3}, 8) == [("train/loss", 1.0, 3)]
    assert logged({"weight": 3, "loss": 1.0}, 0) == [("train/loss", 1.0, 0.0)]  # a filler


def test_results_and_values_keep_their_order() -> None:
    values = LoggedValues()
    values.add_number("lr", 0.1)
    values.add_result({"loss": 1.0}, None, "train/")
    values.add({"later": 2.0})
    assert [name for name, _, _ in values.take()] == ["lr", "train/loss", "later"]
    values.add_result({"loss": 1.0}, None, "train/")
    values.drop()
    assert values.take() == []


def test_values_are_taken_once() -> None:
    values = LoggedValues()
    values.add({"loss": 1.0}, weight=2.0, prefix="train/")
    values.add({"loss": 3.0}, prefix="train/")
    assert values.take() == [("train/loss", 1.0, 2.0), ("train/loss", 3.0, 1.0)]
    assert values.take() == []


class Elsewhere(Tensor):
    """Stands for a tensor of an accelerator, which is not read before it is wanted."""


@pytest.mark.parametrize("kind", [Tensor, Elsewhere])
def test_a_value_that_is_changed_in_place_later_was_logged_before(kind: type[Tensor]) -> None:
    values, running = LoggedValues(), torch.zeros(2).as_subclass(kind)
    running += 1
    values.add({"view": running[0]})
    values.add_result({"view": running[0]}, None, "")
    values.resolve()
    running += 1
    assert [float(value) for _, value, _ in values.take()] == [1.0, 1.0]


@pytest.mark.parametrize("kind", [Tensor, Elsewhere])
def test_a_logged_value_keeps_no_graph_alive(kind: type[Tensor]) -> None:
    values = LoggedValues()
    loss = torch.ones(2, requires_grad=True).sum().as_subclass(kind)
    values.add({"loss": loss})
    ((_, kept, _),) = values.take()
    assert not getattr(kept, "requires_grad", False)
    assert isinstance(kept, kind) == (kind is Elsewhere)


def test_totals_are_weighted_sums_row_by_row() -> None:
    rows = [
        [("a", torch.tensor(1.0), 2.0), ("a", 3, 1.0), ("b", torch.tensor([2.0]), 1.0)],
        [],
        [("a", 0.5, 4.0)],
    ]
    assert totals(rows) == [{"a": (5.0, 3.0), "b": (2.0, 1.0)}, {}, {"a": (2.0, 4.0)}]


def test_values_of_many_types_move_together_in_their_order() -> None:
    values = [torch.tensor(1, dtype=torch.int64), 2.0, torch.tensor([[3.0]]).bfloat16(), 4]
    assert to_host(values) == [1.0, 2.0, 3.0, 4.0]
    assert to_host([1, 2.5]) == [1.0, 2.5]
    assert to_host([]) == []


def test_a_double_arrives_as_it_is() -> None:
    assert to_host([torch.tensor(0.1, dtype=torch.float64)]) == [0.1]


def test_a_mean_over_ranks_weighs_samples_and_leaves_fillers_out() -> None:
    parts = [{"loss": (6.0, 3.0)}, {"loss": (2.0, 1.0), "only": (1.0, 2.0)}, {"loss": (9.0, 0.0)}]
    assert merge_ranks(parts) == {"loss": 2.0, "only": 0.5}
    assert merge_ranks([{"loss": (9.0, 0.0)}]) == {}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_stays_visible(bad: float) -> None:
    (row,) = totals([[("loss", torch.tensor(bad), 1.0)]])
    assert str(merge_ranks([row, {"loss": (1.0, 1.0)}])["loss"]) == str(bad)


def test_a_filler_that_is_not_finite_spoils_nothing() -> None:
    (row,) = totals([[("loss", torch.tensor(math.nan), 0.0), ("loss", torch.tensor(2.0), 1.0)]])
    assert merge_ranks([row]) == {"loss": 2.0}


def test_values_that_arrive_are_the_means_of_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_is_read_at_once", lambda value: False)
    logged = LoggedValues()
    logged.add({"a": torch.tensor(1.0), "b": 2}, weight=3.0)
    logged.add({"a": torch.tensor(3.0)}, weight=torch.tensor(1.0))
    assert metrics.ArrivingValues(logged.newest).values() == {"a": 1.5, "b": 2.0}
    assert metrics.ArrivingValues([]).values() == {}


def test_the_newest_values_are_still_there_when_somebody_has_taken_them() -> None:
    logged = LoggedValues()
    assert logged.newest == []
    logged.add({"a": 1})
    assert [name for name, *_ in logged.newest] == ["a"]
    logged.take()
    assert [name for name, *_ in logged.newest] == ["a"]
    assert logged.take() == []
    assert [name for name, *_ in logged.newest] == ["a"]
    logged.add({"b": 1})
    assert [name for name, *_ in logged.newest] == ["b"]
