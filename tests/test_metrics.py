from __future__ import annotations

import math

import pytest
import torch

from dream_trainer.metrics import LoggedValues, merge_ranks, scalars, to_host, totals


def test_scalars_are_the_numbers_of_what_a_step_returns() -> None:
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
    assert list(scalars(result)) == ["loss", "one", "lr", "count"]
    assert scalars(torch.tensor(2.0)) == {"loss": torch.tensor(2.0)}
    assert scalars(None) == scalars(3.0) == scalars([1.0]) == {}


def test_values_are_taken_once() -> None:
    values = LoggedValues()
    values.add({"loss": 1.0}, weight=2.0, prefix="train/")
    values.add({"loss": 3.0}, prefix="train/")
    assert values.take() == {"train/loss": [(1.0, 2.0), (3.0, 1.0)]}
    assert values.take() == {}


def test_a_value_that_is_changed_in_place_later_was_logged_before() -> None:
    values, running = LoggedValues(), torch.zeros(2)
    running += 1
    values.add({"sum": running, "view": running[0]})
    running += 1
    ((total, _),) = values.take()["view"]
    assert total.item() == 1.0


def test_a_logged_value_keeps_no_graph_alive() -> None:
    values = LoggedValues()
    loss = torch.ones(2, requires_grad=True).sum()
    values.add({"loss": loss})
    ((kept, _),) = values.take()["loss"]
    assert not kept.requires_grad


def test_totals_are_weighted_sums_row_by_row() -> None:
    rows = [
        {"a": [(torch.tensor(1.0), 2.0), (3, 1.0)], "b": [(torch.tensor([2.0]), 1.0)]},
        {},
        {"a": [(0.5, 4.0)]},
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
    (row,) = totals([{"loss": [(torch.tensor(bad), 1.0)]}])
    assert str(merge_ranks([row, {"loss": (1.0, 1.0)}])["loss"]) == str(bad)


def test_a_filler_that_is_not_finite_spoils_nothing() -> None:
    (row,) = totals([{"loss": [(torch.tensor(math.nan), 0.0), (torch.tensor(2.0), 1.0)]}])
    assert merge_ranks([row]) == {"loss": 2.0}
