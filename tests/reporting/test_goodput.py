"""Every second of a run is accounted for, once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from timelines import Line, checkpoint, end, progress, start, validation, write

from dream_trainer.reporting import Goodput, Moment, measure_goodput, read_timeline
from dream_trainer.reporting.goodput import PARTS


def measured(*lines: Line) -> Goodput:
    found = measure_goodput([Moment(one["time"], one["event"], one["step"], one) for one in lines])
    assert found is not None
    assert list(found.parts) == list(PARTS)
    return found


def parts(**seconds: float) -> dict[str, float]:
    return dict.fromkeys(PARTS, 0.0) | seconds


def test_a_run_that_was_over_is_not_down_until_it_is_started_again() -> None:
    def twice(status: str) -> Goodput:
        return measured(
            start(4, began=0),
            progress(14, 20, train=10),
            end(14, 20, status),
            start(1004, step=20, began=1000),
            progress(1010, 30, train=6),
            end(1010, 30),
        )

    for status in ("done", "stopped"):
        found = twice(status)
        assert (found.wall, found.idle, found.share) == (24, 986, 16 / 24)
        assert found.parts == parts(start_up=8, training=16)
    found = twice("interrupted")
    assert (found.wall, found.idle, found.parts["down"]) == (1010, 0, 986)


def test_a_run_that_was_never_interrupted() -> None:
    found = measured(
        start(104, began=100),
        progress(114, 20, train=8, loader=1, other=0.5),
        checkpoint(116, 30),
        validation(119, 40, took=2),
        progress(120, 40, train=10.5, loader=2, validation=2, save=0.5, other=0.5),
        end(120, 40),
    )
    assert found.wall == 20
    assert found.parts == parts(
        start_up=4, training=10.5, loader=2, validation=2, saves=0.5, other=1
    )
    assert (found.share, found.restarts, found.lost_steps) == (10.5 / 20, 0, 0)
    assert (found.attempts[0].status, found.attempts[0].reason) == ("done", None)


def test_what_came_after_the_checkpoint_of_a_killed_run_is_lost() -> None:
    found = measured(
        start(0),
        progress(10, 10, train=9, loader=1),
        checkpoint(12, 12),
        progress(20, 20, train=18, loader=2),
        start(35, 12, began=30),
        progress(45, 22, train=10),
        end(45, 22),
    )
    first, second = found.attempts
    assert (first.counted_step, first.lost_steps, first.counted_until) == (12, 8, 12)
    assert (first.status, second.status, second.resumed_from) == (None, "done", "step-00000012")
    # Of the second ten seconds two count, nine tenths of them training.
    assert found.parts == pytest.approx(
        parts(training=9 + 1.8 + 10, loader=1.2, lost=8, down=10, start_up=5)
    )
    assert found.wall == 45
    assert (found.restarts, found.lost_steps) == (1, 8)


def test_where_no_line_tells_when_the_step_was_done_it_lies_between_its_neighbours() -> None:
    found = measured(
        start(0), progress(10, 10, train=10), progress(20, 30, train=20), start(20, 15)
    )
    assert found.attempts[0].counted_until == 12.5
    assert found.parts == parts(training=12.5, lost=7.5)


def test_a_step_that_an_even_later_start_did_again_is_lost_in_all_before() -> None:
    found = measured(
        start(0),
        progress(10, 10, train=10),
        start(10, 8),
        progress(14, 12, train=4),
        start(14, 5),
        progress(19, 10, train=5),
    )
    assert [one.lost_steps for one in found.attempts] == [5, 4, 0]
    assert found.parts == parts(training=10, lost=9)


def test_a_start_from_the_beginning_leaves_nothing_of_what_was() -> None:
    found = measured(start(0), progress(10, 10, train=10), start(12), progress(15, 3, train=3))
    assert found.parts == parts(training=3, lost=10, down=2)
    assert [one.counted_step for one in found.attempts] == [0, 3]


def test_a_start_that_died_before_its_first_progress() -> None:
    found = measured(start(5, began=0), start(25, began=20), progress(30, 5, train=5), end(30, 5))
    assert found.parts == parts(start_up=10, down=15, training=5)
    assert found.attempts[0].ended == 5


def test_the_end_of_a_killed_start_is_training_less_what_is_known_of_it() -> None:
    found = measured(
        start(0), progress(10, 10, train=10), validation(14, 13, took=2), checkpoint(16, 15, 0.5)
    )
    assert found.parts == parts(training=13.5, validation=2, saves=0.5)


def test_time_without_steps_that_nobody_measured_is_other() -> None:
    assert measured(start(0), end(3, 0, "failed", "no data")).parts == parts(other=3)


def test_the_reason_of_an_end_is_told() -> None:
    found = measured(start(0), end(1, 5, "stopped", "loss is low enough"))
    assert found.attempts[0].status == "stopped"
    assert found.attempts[0].reason == "loss is low enough"


def test_a_clock_that_goes_back_stands_still() -> None:
    found = measured(
        start(100),
        progress(110, 10, train=10),
        progress(105, 15, train=15),  # set back in the middle of the run
        progress(112, 20, train=20),
        start(90, 20, began=85),  # another host, another clock
        progress(120, 25, train=5),
    )
    assert found.wall == 20
    assert sum(found.parts.values()) == 20
    assert found.parts == parts(training=17, other=3)


def test_more_seconds_than_the_clock_has_are_fewer() -> None:
    found = measured(start(0), progress(10, 10, train=15, loader=5))
    assert found.parts == parts(training=7.5, loader=2.5)


def test_starts_that_overlap_do_not_count_twice() -> None:
    found = measured(
        start(0), progress(20, 20, train=20), start(15, 10, began=12), progress(30, 30, train=15)
    )
    assert found.wall == 30
    assert sum(found.parts.values()) == 30
    assert found.parts["down"] == 0


def test_lines_before_any_start_are_a_start() -> None:
    found = measured(progress(10, 5, train=100), progress(20, 15, train=110))
    assert found.parts == parts(training=10)


def test_no_line_is_no_goodput_and_one_is_no_time() -> None:
    assert measure_goodput([]) is None
    found = measured(start(7))
    assert (found.wall, found.share, sum(found.parts.values())) == (0, 0, 0)


moments = st.builds(
    lambda event, time, step, began, train, loader, stall: {
        "start": start(time, step, began=began),
        "progress": progress(time, step, train=train, loader=loader),
        "checkpoint": checkpoint(time, step, stall),
        "validation": validation(time, step, stall),
        "end": end(time, step),
    }[event],
    st.sampled_from(["start", "progress", "progress", "checkpoint", "validation", "end"]),
    *[st.integers(0, 60) for _ in range(6)],
)


@given(st.lists(moments, min_size=1, max_size=25))
def test_the_parts_are_the_wall_time_whatever_the_lines_say(lines: list[Line]) -> None:
    found = measured(*lines)
    assert all(seconds >= 0 for seconds in found.parts.values())
    assert sum(found.parts.values()) == pytest.approx(found.wall)
    assert 0 <= found.share <= 1
    assert found.lost_steps >= 0


def read(tmp_path: Path, *lines: Line | str) -> tuple[list[tuple[str, int]], list[str]]:
    found, problems = read_timeline(write(tmp_path / "timeline.jsonl", *lines))
    return [(one.event, one.step) for one in found], problems


def test_half_lines_of_killed_runs_are_passed_over(tmp_path: Path) -> None:
    cut = '{"time": 12.5, "event": "prog'
    assert read(tmp_path, start(0), cut) == ([("start", 0)], [])
    found = read(tmp_path, start(0), cut + "\n", start(20, 3), progress(30, 9, train=1), cut)
    assert found == ([("start", 0), ("start", 3), ("progress", 9)], [])
    assert read(tmp_path, start(0), cut + "\n", "") == ([("start", 0)], [])


def test_half_a_line_in_the_middle_of_a_start_is_told(tmp_path: Path) -> None:
    found, problems = read(tmp_path, start(0), '{"time"\n', progress(30, 9, train=1))
    assert found == [("start", 0), ("progress", 9)]
    assert len(problems) == 1
    assert problems[0].startswith("timeline.jsonl, line 2: ")


@pytest.mark.parametrize(
    "line",
    [
        {"event": "end", "step": 1},
        {"time": "noon", "event": "end", "step": 1},
        {"time": float("nan"), "event": "end", "step": 1},
        {"time": 1, "event": "progress", "step": 1, "seconds": {"train": float("inf")}},
        {"time": 1, "event": "progress", "step": 1, "seconds": 4},
        {"time": 1, "event": "checkpoint", "step": 1, "stall": "long"},
        [1, 2],
    ],
)
def test_lines_that_say_nothing_are_told_and_left_out(tmp_path: Path, line: Any) -> None:
    found, problems = read(tmp_path, start(0), line, end(9, 9))
    assert found == [("start", 0), ("end", 9)]
    assert len(problems) == 1


def test_no_file_is_no_timeline(tmp_path: Path) -> None:
    assert read_timeline(tmp_path / "timeline.jsonl") == ([], [])
    assert read(tmp_path) == ([], [])
