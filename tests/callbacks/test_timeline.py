"""timeline.jsonl: what really happened, in order, whatever ended the run."""

from __future__ import annotations

import json
import os
import resource
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support import TinyTrainer, run_ranks, tiny

from dream_trainer import Callback, Timeline
from dream_trainer.coordination import CountingPlace, Interrupted, Place, Preempted
from dream_trainer.loggers import TimelineFile

pytestmark = pytest.mark.may_leave("rng")


def lines(trainer: Any) -> list[dict[str, Any]]:
    text = (trainer.run_directory / "timeline.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def events(trainer: Any) -> list[tuple[str, int, int]]:
    return [(one["event"], one["step"], one["epoch"]) for one in lines(trainer)]


class Ticking:
    """A clock that a test moves, and that moves by itself a little."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Working(TinyTrainer):
    """Each batch takes a second to load, two to train on; a validation batch takes four."""

    clock_of_test: Ticking

    def batch_to_device(self, batch: Any) -> Any:
        if not self.loop.is_evaluating:
            self.clock_of_test.now += 1
        return super().batch_to_device(batch)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.clock_of_test.now += 2
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.clock_of_test.now += 4
        return super().validation_step(batch, batch_idx)


def working(root: Path, kind: type[Working] = Working, seconds: float = 7, **options: Any) -> Any:
    clock = Ticking()
    timeline = Timeline(seconds, clock, clock)
    callbacks = {"timeline": timeline, **options.pop("callbacks", {})}
    trainer = tiny(root, kind, callbacks=callbacks, **options)
    trainer.clock_of_test = clock
    return trainer


def test_a_run_tells_its_events_in_order_and_where_its_time_went(tmp_path: Path) -> None:
    trainer = working(tmp_path, n_epochs=1)
    trainer.fit()
    found = lines(trainer)
    assert [(one["time"], one["event"], one["step"]) for one in found] == [
        (100, "start", 0),
        (109, "progress", 3),
        (118, "progress", 6),
        (130, "validation", 6),
        (130, "progress", 6),
        (130, "checkpoint", 6),
        (130, "progress", 6),
        (130, "end", 6),
    ]
    start, first, second, validation, third, checkpoint, _, end = found
    assert (start["ranks"], start["resumed_from"], start["device"]) == (1, None, "cpu")
    assert start["pid"] == os.getpid()
    nothing = {"validation": 0, "save": 0, "other": 0}
    assert first["seconds"] == {"train": 6, "loader": 3, **nothing}
    assert second["seconds"] == {"train": 12, "loader": 6, **nothing}
    assert third["seconds"] == {"train": 12, "loader": 6, **nothing, "validation": 12}
    assert [one["samples"] for one in (first, second, third)] == [12, 24, 24]
    assert [one["batches"] for one in (first, second, third)] == [3, 6, 6]
    assert first["measured"] == {
        "loader_wait": pytest.approx(1 / 3, abs=1e-6),
        "samples_per_second": pytest.approx(4 / 3, abs=1e-5),
    }
    assert third["measured"] == {}  # of a validation alone
    assert validation["took"] == 12
    assert checkpoint["name"] == "step-00000006"
    assert checkpoint["stall"] >= 0
    assert (end["status"], end["reason"]) == ("done", None)
    assert type(trainer.place) is Place


def test_a_restart_goes_on_at_the_end_of_the_file(tmp_path: Path) -> None:
    options = {"every_n_epochs": 2, "has_validation": False}
    first = working(tmp_path, max_steps=5, **options)
    first.fit()
    before = lines(first)
    assert [(one["event"], one["step"]) for one in before] == [
        ("start", 0),
        ("progress", 3),
        ("checkpoint", 5),
        ("progress", 5),
        ("end", 5),
    ]
    half = '{"time": 119, "event": "pro'
    with (first.run_directory / "timeline.jsonl").open("a", encoding="utf-8") as file:
        file.write(half)  # killed while it wrote
    trainer = working(tmp_path, seconds=1000, **options)
    trainer.fit()
    text = (trainer.run_directory / "timeline.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in text[:5]] == before
    assert text[5] == half
    after = [json.loads(line) for line in text[6:]]
    assert [(one["event"], one["step"], one["epoch"]) for one in after] == [
        ("start", 5, 0),
        ("checkpoint", 12, 2),
        ("progress", 12, 2),
        ("end", 12, 2),
    ]
    assert after[0]["resumed_from"] == "step-00000005"
    assert after[-2]["samples"] == 28  # since this start
    assert after[0]["began"] > 1e9


class EndsBy(Callback):
    """Ends the run after two steps, in one of the ways there are."""

    def __init__(self, way: str) -> None:
        self.way = way

    def post_train_step(self, trainer: Any, result: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step != 2:
            return
        if self.way == "stop":
            trainer.stop("enough")
        elif self.way == "error":
            raise ZeroDivisionError("by zero")
        else:
            os.kill(os.getpid(), signal.Signals[self.way])


@pytest.mark.parametrize(
    ("way", "error", "end"),
    [
        ("stop", None, ("stopped", "enough")),
        ("SIGINT", Interrupted, ("interrupted", "SIGINT")),
        ("SIGTERM", Preempted, ("interrupted", "SIGTERM")),
        ("error", ZeroDivisionError, ("failed", "ZeroDivisionError: by zero")),
    ],
)
def test_the_end_says_how_it_came(
    tmp_path: Path, way: str, error: type[BaseException] | None, end: tuple[str, str]
) -> None:
    trainer = tiny(tmp_path, callbacks={"end": EndsBy(way)})
    if error is None:
        trainer.fit()
    else:
        with pytest.raises(error):
            trainer.fit()
    found = lines(trainer)
    saved = [] if way == "error" else ["checkpoint"]
    assert [one["event"] for one in found] == ["start", *saved, "progress", "end"]
    assert (found[-1]["status"], found[-1]["reason"]) == end
    assert found[-1]["step"] == 2


def test_a_run_without_a_directory_and_one_without_a_timeline_write_none(tmp_path: Path) -> None:
    tiny(tmp_path, enable=False).fit()
    assert not [*tmp_path.rglob("timeline.jsonl")]
    tiny(tmp_path, callbacks={"timeline": None}).fit()
    assert not [*tmp_path.rglob("timeline.jsonl")]


def test_validate_writes_nothing(tmp_path: Path) -> None:
    trainer = tiny(tmp_path)
    trainer.fit()
    before = events(trainer)
    tiny(tmp_path).validate()
    assert events(trainer) == before


@pytest.mark.distributed
def test_rank_0_alone_writes_and_counts_the_samples_of_all(tmp_path: Path) -> None:
    def rank() -> tuple[list[dict[str, Any]], bool]:
        trainer = tiny(tmp_path, n_epochs=1)
        trainer.fit()
        return lines(trainer), isinstance(trainer.place, CountingPlace)

    (found, _), _ = run_ranks(2, rank)
    assert [one["event"] for one in found].count("start") == 1
    assert (found[0]["ranks"], found[-2]["samples"], found[-2]["batches"]) == (2, 24, 3)


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """No file of this process may grow past some bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


def test_a_full_disk_is_told_once_and_the_next_event_has_a_line_of_its_own(tmp_path: Path) -> None:
    file = TimelineFile(tmp_path / "folder" / "timeline.jsonl")
    file.write({"event": "start"})
    with full_disk(30), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        file.write({"event": "progress"})  # a part of it has room
        file.write({"event": "progress"})
    assert len(told) == 1
    assert "misses events of the run, which goes on" in str(told[0].message)
    file.write({"event": "end"})
    file.close()
    written = (tmp_path / "folder" / "timeline.jsonl").read_text(encoding="utf-8").splitlines()
    assert written == ['{"event": "start"}', '{"event": "', '{"event": "end"}']


def test_a_folder_that_cannot_be_written_ends_nothing(tmp_path: Path) -> None:
    (tmp_path / "here").write_text("a file")
    file = TimelineFile(tmp_path / "here" / "timeline.jsonl")
    with pytest.warns(RuntimeWarning, match="misses events"):
        file.write({"event": "start"})
    file.close()


def test_a_place_counts_from_when_it_is_asked_and_not_before() -> None:
    place, clock = Place(), Ticking()
    place.enter("setup")
    counting = place.count_seconds(clock)
    assert counting is place
    for phase, seconds in (("loader", 1), ("validation", 2), ("save", 4), ("end", 8)):
        place.enter(phase)
        clock.now += seconds
    place.enter_step(1, 0, 0)
    for phase in ("backward", "training_step", "optimizer step", "training_step"):
        clock.now += 16
        place.enter(phase)
    assert counting.seconds == {"train": 64, "loader": 1, "validation": 2, "save": 4, "other": 8}
    assert counting.seconds_here == 64
    assert str(place) == "training_step, step 1, epoch 0, batch 0"
    counting.stop_counting()
    assert type(place) is Place
    assert place.phase == "training_step"
