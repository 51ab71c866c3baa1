"""Long curves keep their ends and their peaks; steps lie where the clock saw them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from timelines import checkpoint, progress, start, write

from dream_trainer.reporting import Goodput, measure_goodput, read_timeline
from dream_trainer.reporting.curves import (
    CurveCollector,
    arrange,
    buckets,
    measured_curves,
    step_clock,
)


def goodput_of(path: Path) -> Goodput | None:
    return measure_goodput(read_timeline(path)[0])


@given(st.lists(st.floats(width=32), min_size=9, max_size=60))
def test_each_bucket_keeps_its_lowest_and_highest_value(values: list[float]) -> None:
    array = np.array([value if math.isfinite(value) else math.nan for value in values])
    edges, kept = buckets(array, 4)
    assert (kept[0], kept[-1]) == (0, len(array) - 1)
    assert len(kept) <= 2 * 4 + 2
    assert list(kept) == sorted(set(kept))
    for begin, stop in zip(edges, [*edges[1:], len(array)], strict=True):
        inside = array[begin:stop]
        found = array[kept[(kept >= begin) & (kept < stop)]]
        if not np.isnan(inside).all():
            assert np.nanmin(found) == np.nanmin(inside)
            assert np.nanmax(found) == np.nanmax(inside)


def test_a_long_curve_is_thinned_and_a_short_one_is_not() -> None:
    collector = CurveCollector()
    for step in range(1, 1001):
        collector.add("loss", 50.0 if step == 777 else float(step % 2), step)
        if step % 100 == 0:
            collector.add("val", math.inf if step == 100 else 1.0, step)
    curves = collector.curves(100)
    loss, val = curves["loss"], curves["val"]
    assert len(loss.steps) <= 102
    assert loss.num_values == 1000
    assert loss.steps[list(loss.values).index(50.0)] == 777
    assert loss.means is not None
    steps, means, seconds = loss.means
    assert (len(steps), seconds) == (50, None)
    assert (steps[0], means[0]) == (10.5, 0.5)
    assert (val.means, val.num_not_finite, list(val.steps)) == (
        None,
        1,
        list(range(100, 1001, 100)),
    )
    assert math.isnan(val.values[0])
    assert len(collector.curves(None)["loss"].steps) == 1000


def test_steps_lie_at_the_time_of_the_start_whose_steps_count(tmp_path: Path) -> None:
    path = write(
        tmp_path / "timeline.jsonl",
        start(110, began=100),
        progress(120, 10, train=10),
        checkpoint(121, 12),
        progress(130, 20, train=20),  # beyond 12 lost
        start(150, 12, began=140),
        progress(160, 22, train=10),
    )
    clock = step_clock(goodput_of(path))
    assert clock is not None
    seconds = np.interp([0, 5, 10, 12, 13, 22], *clock)
    assert seconds == pytest.approx([10, 15, 20, 21, 51, 60], abs=0.01)
    assert all(np.diff(clock[0]) > 0)
    assert step_clock(None) is None


def test_a_start_whose_steps_were_all_done_again_says_nothing_of_them(tmp_path: Path) -> None:
    path = write(
        tmp_path / "timeline.jsonl",
        start(0),
        progress(10, 10, train=10),
        start(20),
        progress(24, 4, train=4),
        start(30, 4),
        progress(36, 10, train=6),
    )
    clock = step_clock(goodput_of(path))
    assert clock is not None
    assert np.interp([2, 4, 7, 10], *clock) == pytest.approx([22, 24, 33, 36], abs=0.01)


def test_what_was_measured_is_broken_between_two_starts(tmp_path: Path) -> None:
    path = write(
        tmp_path / "timeline.jsonl",
        start(0),
        progress(10, 10, {"samples_per_second": 5, "memory/process_gib": 1.5}, train=9),
        start(20, 8),
        progress(30, 18, {"samples_per_second": 6}, train=9),
        progress(30, 18, {"loader_wait": 1.0}, train=9),  # over no batch
    )
    found = measured_curves(goodput_of(path), None)
    assert list(found) == ["samples_per_second", "memory/process_gib"]
    speed = found["samples_per_second"]
    assert speed.seconds is not None
    assert list(speed.steps[[0, 2]]) == [10, 18]
    assert list(speed.seconds[[0, 2]]) == [10, 30]
    assert (speed.values[0], speed.values[2]) == (5, 6)
    assert math.isnan(speed.values[1])
    assert measured_curves(None, None) == {}


def test_phases_of_a_quantity_share_a_chart() -> None:
    names = ["lr/model", "lr/head", "val/accuracy", "val/loss", "train/loss", "train/grad_norm"]
    charts = arrange([*names, "mine", "validation/accuracy", "test/loss"])
    assert [(one.title, dict(one.lines)) for one in charts] == [
        ("loss", {"train/loss": "train", "val/loss": "val", "test/loss": "test"}),
        ("accuracy", {"val/accuracy": "val", "validation/accuracy": "val"}),
        ("grad_norm", {"train/grad_norm": "train"}),
        ("mine", {"mine": "mine"}),
        ("lr", {"lr/head": "head", "lr/model": "model"}),
    ]
