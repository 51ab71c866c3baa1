"""Pace: counts per second from marks alone, so that no test of it waits."""

from __future__ import annotations

import pytest

from dream_trainer.callbacks.pace import Pace, duration_in_words, rate_in_words


def test_a_pace_counts_from_its_first_mark() -> None:
    pace = Pace()
    assert pace.per_second is None
    pace.mark(100.0, 1_000_000)  # of earlier processes
    assert (pace.per_second, pace.seconds_for(5)) == (None, None)
    pace.mark(110.0, 1_000_020)
    assert (pace.per_second, pace.seconds_for(5)) == (2.0, 2.5)
    pace.mark(120.0, 1_000_100)
    assert pace.per_second == 5.0


def test_a_pace_of_late_forgets_what_was_long_ago() -> None:
    pace = Pace(window=10.0)
    for second in range(100):
        pace.mark(float(second), second)
    for second in range(100, 120):
        pace.mark(float(second), 100 + 3 * (second - 100))
    assert pace.per_second == 3.0


def test_marks_that_are_far_apart_still_make_a_pace() -> None:
    pace = Pace(window=10.0)
    for count in range(20):
        pace.mark(count * 60.0, count)
    assert pace.per_second == pytest.approx(1 / 60)


def test_time_that_is_left_out_slows_nothing_down() -> None:
    pace = Pace()
    pace.mark(0.0, 0)
    pace.mark(10.0, 10)
    pace.leave_out(90.0)
    pace.mark(110.0, 20)
    assert pace.per_second == 1.0


def test_words() -> None:
    assert [duration_in_words(one) for one in (None, 4.4, 3723, 200_000)] == [
        "",
        "0:00:04",
        "1:02:03",
        "2 d 07:33:20",
    ]
    assert [rate_in_words(one, "step", "steps") for one in (None, 17.24, 0.25)] == [
        "",
        "17.2 steps/s",
        "4 s/step",
    ]
