from __future__ import annotations

import json
import math
import zlib
from pathlib import Path

import pytest

from dream_trainer.loggers import JsonlLog


@pytest.fixture
def log(tmp_path: Path):
    one = JsonlLog(tmp_path / "run" / "metrics.jsonl")
    yield one
    one.close()


def row(step: int) -> dict[str, float]:
    return {"step": step, "loss": 0.5}


def test_a_row_is_one_line_of_json(log: JsonlLog) -> None:
    log.write([row(1), row(2)])
    log.write([row(3)])
    lines = log.path.read_bytes().splitlines(keepends=True)
    assert lines == [b'{"step": %d, "loss": 0.5}\n' % step for step in (1, 2, 3)]
    assert log.read() == [row(1), row(2), row(3)]


def test_no_file_is_made_before_the_first_row(log: JsonlLog) -> None:
    log.write([])
    assert not log.path.parent.exists()
    assert log.size == 0
    assert log.read() == []


def test_the_size_is_that_of_the_file_after_every_write(log: JsonlLog) -> None:
    for step in range(3):
        log.write([row(step)])
        assert log.size == log.path.stat().st_size == len(log.path.read_bytes())


def test_rows_after_a_checkpoint_are_cut_and_written_again_without_gap_or_double(
    log: JsonlLog,
) -> None:
    log.write([row(1), row(2)])
    size, crc32 = log.size, log.crc32
    log.write([row(3), row(4)])
    whole = log.path.read_bytes()
    log.path.write_bytes(whole + b'{"step": 5, "lo')  # killed while writing

    resumed = JsonlLog(log.path)
    assert resumed.resume(size, crc32)
    resumed.write([row(3), row(4)])
    resumed.close()

    assert log.path.read_bytes() == whole


def test_a_log_that_is_open_can_go_back(log: JsonlLog) -> None:
    log.write([row(1)])
    size, crc32 = log.size, log.crc32
    log.write([row(2)])
    assert log.resume(size, crc32)
    log.write([row(3)])
    assert log.read() == [row(1), row(3)]
    assert JsonlLog(log.path).resume(log.size, log.crc32)


def test_a_checkpoint_without_rows_begins_a_new_file(log: JsonlLog) -> None:
    assert log.resume(0, 0)
    log.write([row(1)])
    assert log.resume(0, 0)
    log.write([row(2)])
    assert log.read() == [row(2)]
    assert JsonlLog(log.path.with_name("metrics.jsonl.superseded-1")).read() == [row(1)]


@pytest.mark.parametrize("change", ["absent", "shorter", "edited"])
def test_another_file_than_the_checkpoints_is_kept_under_another_name(
    log: JsonlLog, change: str
) -> None:
    log.write([row(1), row(2)])
    size, crc32 = log.size, log.crc32
    before = log.path.read_bytes()
    before = before[:-5] if change == "shorter" else before.replace(b"0.5", b"0.6")
    log.path.write_bytes(before)
    if change == "absent":
        log.path.unlink()
    with pytest.warns(UserWarning, match=f"does not begin with the {size} bytes of rows"):
        assert not log.resume(size, crc32)
    log.write([row(3)])
    assert log.read() == [row(3)]
    aside = log.path.with_name("metrics.jsonl.superseded-1")
    assert aside.exists() == (change != "absent")
    assert change == "absent" or aside.read_bytes() == before


def test_values_that_json_has_no_number_for_are_words_and_come_back_as_floats(
    log: JsonlLog,
) -> None:
    log.write([{"a": math.nan, "b": math.inf, "c": -math.inf, "d": -0.0}])
    text = log.path.read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "a": "nan",
        "b": "inf",
        "c": "-inf",
        "d": -0.0,
    }
    (back,) = log.read()
    assert math.isnan(back["a"])
    assert (back["b"], back["c"]) == (math.inf, -math.inf)


def test_every_float_comes_back_to_the_bit(log: JsonlLog) -> None:
    values = {str(i): value for i, value in enumerate([0.1, 1e-310, 2**53 + 1.0, 1 / 3, 1e300])}
    log.write([values])
    assert log.read() == [values]


def test_a_closed_log_can_be_written_again(log: JsonlLog) -> None:
    log.write([row(1)])
    log.close()
    log.close()
    log.write([row(2)])
    assert log.read() == [row(1), row(2)]


def test_a_row_that_cannot_be_written_writes_nothing(log: JsonlLog) -> None:
    log.write([row(1)])
    with pytest.raises(TypeError):
        log.write([row(2), {"bad": object()}])
    assert log.read() == [row(1)]


def test_a_write_that_fails_leaves_the_rows_that_are_not_synced(
    log: JsonlLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    log.write([row(1)])
    file = log._file
    assert file is not None

    class Full:
        """Takes half a row."""

        def write(self, data: memoryview) -> int:
            if len(data) < 8:
                raise OSError("full")
            return file.write(data[: len(data) - 7])

    monkeypatch.setattr(log, "_file", Full())
    with pytest.raises(OSError, match="full"):
        log.write([row(2)])
    monkeypatch.setattr(log, "_file", file)
    log.write([row(3)])
    assert log.read() == [row(1), row(3)]
    log.sync()
    log.write([row(4)])
    log.go_back()
    log.write([row(5)])
    assert log.read() == [row(1), row(3), row(5)]
    assert log.crc32 == zlib.crc32(log.path.read_bytes())
