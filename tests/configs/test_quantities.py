"""Durations and sizes compute as numbers and print as they were written."""

from __future__ import annotations

import copy
import json
import pickle
from datetime import timedelta
from typing import Any

import pytest

from dream_trainer.configs import DeviceParameters, Duration, Size, TrainingParameters
from dream_trainer.configs.quantities import duration_text
from dream_trainer.configs.yaml_text import dump_yaml, load_yaml
from dream_trainer.errors import ConfigError

DURATIONS: dict[float | str, float] = {
    "30m": 1800,
    "1h30m": 5400,
    "1h 30m": 5400,
    "90s": 90,
    "2d": 172800,
    "1w": 604800,
    "1.5h": 5400,
    "250ms": 0.25,
    "7ms": 0.007,
    "00:30:00": 1800,
    "1:30:00": 5400,
    "2-12:00:00": 216000,
    "02:12:00:00": 216000,
    "1800": 1800,
    "1e3": 1000,
    1800: 1800,
    0.5: 0.5,
    0: 0,
}
SIZES: dict[float | str, int] = {
    "512MiB": 512 << 20,
    "2GB": 2_000_000_000,
    "1.5GiB": 3 << 29,
    "2 kb": 2000,
    "7B": 7,
    "3PiB": 3 << 50,
    "1024": 1024,
    1024: 1024,
    2.0: 2,
}


@pytest.mark.parametrize(("given", "seconds"), DURATIONS.items())
def test_a_duration_is_its_seconds_and_prints_as_it_was_given(
    given: float | str, seconds: float
) -> None:
    duration = Duration(given)
    assert (duration, float(duration), str(duration)) == (seconds, seconds, str(given))
    assert f"{duration}" == str(given)
    assert load_yaml(dump_yaml({"t": duration}))["t"] == duration.plain
    assert str(Duration(load_yaml(dump_yaml([duration]))[0])) == str(given)


@pytest.mark.parametrize(("given", "number"), SIZES.items())
def test_a_size_is_its_bytes_and_prints_as_it_was_given(given: float | str, number: int) -> None:
    size = Size(given)
    assert (size, int(size), str(size)) == (number, number, str(given))
    assert str(Size(load_yaml(dump_yaml([size]))[0])) == str(given)


def test_a_number_stays_a_number_in_a_file() -> None:
    given = {"a": Duration(1800), "b": Duration("30m"), "c": Duration("1800"), "d": Size(1024)}
    assert dump_yaml(given) == "a: 1800\nb: 30m\nc: 1800\nd: 1024\n"


@pytest.mark.parametrize("text", ["00:30:00", "1:30:00", "12:00", "1:02:03.5"])
def test_a_time_of_a_clock_is_text_in_yaml(text: str) -> None:
    assert load_yaml(f"t: {text}") == {"t": text}
    assert load_yaml(dump_yaml({"t": text})) == {"t": text}


@pytest.mark.parametrize("value", [Duration("90s"), Duration(90), Size("2GB"), Size(5)])
def test_a_quantity_survives_copies_and_pickles(value: Duration | Size) -> None:
    copies = (pickle.loads(pickle.dumps(value)), copy.copy(value), copy.deepcopy(value))
    for one in copies:
        assert (type(one), one, str(one)) == (type(value), value, str(value))
        assert repr(one) == repr(value)
    assert str(type(value)(value)) == str(value)  # type: ignore[arg-type]
    assert json.loads(json.dumps(value)) == value


def test_a_quantity_computes_as_a_number() -> None:
    assert Duration("30m") + 30 == 1830
    assert sorted([Duration("1h"), Duration("90s")])[0] == 90
    assert Duration("30m") == Duration(1800) == 1800.0
    assert {1800.0: "x"}[Duration("30m")] == {1800: "x"}[Duration("30m")] == "x"
    assert timedelta(seconds=Duration("30m")) == timedelta(minutes=30)
    assert Size("1KiB") // 2 == 512
    assert list(range(4))[Size(2)] == 2
    assert f"{Duration('1.5h'):g}" == "5400"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (timedelta(hours=1, minutes=30), "1h30m"),
        (timedelta(days=2), "2d"),
        (timedelta(seconds=90.5), "1m30.5s"),
        (timedelta(milliseconds=250), "250ms"),
        (timedelta(microseconds=7), "0.007ms"),
        (timedelta(0), "0s"),
    ],
)
def test_a_timedelta_gets_the_text_of_its_duration(value: timedelta, text: str) -> None:
    assert str(Duration(value)) == duration_text(value) == text
    assert timedelta(seconds=Duration(text)) == value


@pytest.mark.parametrize(
    "wrong",
    ["", "30x", "m", "30m1h", "1m1m", "1:30", "1:99:00", "nan", "inf", "-5", "- 5m", "1e999",
     "9" * 500, "h1", "30 m x", "一時間", True, None, -1, float("nan"), [1], b"30m",
     timedelta(seconds=-1)],
)  # fmt: skip
def test_what_is_no_duration_is_refused_in_words(wrong: Any) -> None:
    with pytest.raises(ValueError, match="is not a duration: write 30s, 30m, 1h30m, 2d or seconds"):
        Duration(wrong)


@pytest.mark.parametrize("wrong", ["", "5M", "5 giga", "-1GB", "GB", True, None, -3, "inf", [1]])
def test_what_is_no_size_is_refused_in_words(wrong: Any) -> None:
    with pytest.raises(ValueError, match="is not a size: write 512MiB, 2GB or bytes"):
        Size(wrong)


@pytest.mark.parametrize("given", ["0.5B", "1.0001KiB", 1.5])
def test_half_a_byte_is_refused(given: float | str) -> None:
    with pytest.raises(ValueError, match="is not a whole number of bytes: it is"):
        Size(given)


def test_parameters_take_durations_in_every_form() -> None:
    for given in (1800, 1800.0, "30m", timedelta(minutes=30), Duration("30m")):
        parameters = TrainingParameters(max_time=given, grace_seconds=given)
        assert isinstance(parameters.max_time, Duration)
        assert parameters.max_time == parameters.grace_seconds == 1800
        device = DeviceParameters(timeout_seconds=given, failure_timeout_seconds=given)
        assert device.timeout_seconds == device.failure_timeout_seconds == 1800
    assert TrainingParameters().max_time is None
    assert str(DeviceParameters().timeout_seconds) == "10m"


def test_a_bad_duration_is_a_problem_among_the_others() -> None:
    with pytest.raises(ConfigError) as caught:
        TrainingParameters(max_steps=0, max_time="30x", grace_seconds="0s")
    assert caught.value.problems == (
        "max_steps=0 is not a whole number above 0",
        "max_time='30x' is not a duration: write 30s, 30m, 1h30m, 2d or seconds",
        "grace_seconds=0s is not a duration above 0",
    )
    with pytest.raises(ConfigError) as caught:
        DeviceParameters(timeout_seconds="soon", failure_timeout_seconds="1s")
    assert caught.value.problems == (
        "timeout_seconds='soon' is not a duration: write 30s, 30m, 1h30m, 2d or seconds",
        "failure_timeout_seconds=1s is not 2 seconds or more",
    )
