"""What is written on a command line or in a file is what a configuration prints."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Optional, Union

import jsonargparse.typing
import pytest
import torch

from dream_trainer.cli.config_parser import ConfigParser
from dream_trainer.cli.value_types import register_value_types
from dream_trainer.configs import Duration, Size
from dream_trainer.configs.yaml_text import load_yaml
from dream_trainer.errors import ConfigError
from dream_trainer.trainer import BaseTrainerConfig
from dream_trainer.trainer.run_directory import config_yaml


@dataclass(kw_only=True)
class Values:
    duration: Duration = Duration(5)  # noqa: RUF009 - it cannot be changed
    optional_duration: Duration | None = None
    durations: list[Duration] = field(default_factory=list)
    size: Size | None = None
    sizes: dict[str, Size] = field(default_factory=dict)
    delta: timedelta = timedelta(minutes=90)
    optional_delta: timedelta | None = None
    dtype: torch.dtype = torch.float32
    optional_dtype: torch.dtype | None = None
    int_first: int | float = 7
    float_first: float | int = 7
    optional_number: int | float | None = None
    old_style: Optional[Union[float, int]] = None  # noqa: UP007, UP045
    numbers: list[float | int] = field(default_factory=list)
    decimal: float = 7.0
    anything: Any = None
    text: str = ""


def parsed(*options: str, file: str = "") -> tuple[Values, dict[str, Any], str]:
    """The values, what is printed of them as data, and the text."""
    parser = ConfigParser(Values, "test")
    namespace = parser.parse([*options, *(["--config", file] if file else [])]).namespace
    text = parser.dump(namespace, {})
    return parser.instantiate(namespace)[0], load_yaml(text), text


def both_ways(tmp_path: Path, name: str, written: str) -> list[tuple[Any, Any]]:
    """Value and printed value of an option, and of the same in a file."""
    path = tmp_path / "values.yaml"
    path.write_text(f"{name}: {written}\n")
    found = []
    for values, printed, _ in (parsed(f"--{name}={written}"), parsed(file=str(path))):
        found.append((getattr(values, name), printed[name]))
    return found


@pytest.mark.parametrize("name", ["duration", "optional_duration", "delta", "optional_delta"])
@pytest.mark.parametrize(
    ("written", "seconds"),
    [("30m", 1800), ("90s", 90), ("00:30:00", 1800), ("1:30:00", 5400), ("250ms", 0.25)],
)
def test_durations_print_as_they_were_written(
    tmp_path: Path, name: str, written: str, seconds: float
) -> None:
    for value, printed in both_ways(tmp_path, name, written):
        if isinstance(value, timedelta):
            value = value.total_seconds()
        assert (value, printed) == (seconds, written)


@pytest.mark.parametrize("name", ["duration", "optional_duration", "delta"])
def test_seconds_print_as_a_number(tmp_path: Path, name: str) -> None:
    for written, number in (("1800", 1800), ("0.5", 0.5)):
        for _, printed in both_ways(tmp_path, name, written):
            assert (type(printed), printed) == (type(number), number)


def test_sizes_print_as_they_were_written(tmp_path: Path) -> None:
    for written, number in (("512MiB", 512 << 20), ("2GB", 2 * 10**9), ("1024", 1024)):
        for value, printed in both_ways(tmp_path, "size", written):
            assert (value, str(printed)) == (number, written)


@pytest.mark.parametrize("written", ["bfloat16", "torch.bfloat16"])
def test_dtypes_go_by_their_name(tmp_path: Path, written: str) -> None:
    for name in ("dtype", "optional_dtype"):
        for found in both_ways(tmp_path, name, written):
            assert found == (torch.bfloat16, "bfloat16")


@pytest.mark.parametrize("name", ["int_first", "float_first", "optional_number", "old_style"])
@pytest.mark.parametrize(
    ("written", "number"),
    [("1", 1), ("1.0", 1.0), ("0.25", 0.25), ("7", 7), ("7.0", 7.0), ("1e-3", 0.001),
     ("1_000", 1000), ("-2", -2)],
)  # fmt: skip
def test_numbers_stay_what_they_are(tmp_path: Path, name: str, written: str, number: float) -> None:
    for value, printed in both_ways(tmp_path, name, written):
        assert (type(value), value) == (type(number), number)
        assert (type(printed), printed) == (type(number), number)


def test_numbers_stay_what_they_are_inside_lists_and_where_anything_goes(tmp_path: Path) -> None:
    for name in ("numbers", "anything"):
        for found in both_ways(tmp_path, name, "[1, 1.0, 0.5]"):
            assert [[type(number) for number in one] for one in found] == [[int, float, float]] * 2
    for written, number in (("1", 1), ("1.0", 1.0), ("1e-3", 0.001)):
        for value, _ in both_ways(tmp_path, "anything", written):
            assert (type(value), value) == (type(number), number)


def test_a_float_is_a_float_and_text_is_text(tmp_path: Path) -> None:
    for value, printed in both_ways(tmp_path, "decimal", "1"):
        assert type(value) is type(printed) is float
    path = tmp_path / "text.yaml"
    path.write_text('text: "1"\n')
    for values, printed, text in (parsed("--text=1"), parsed(file=str(path))):
        assert values.text == printed["text"] == "1"
        assert "text: '1'\n" in text


def test_null_is_no_number_but_may_stand_for_none(tmp_path: Path) -> None:
    assert both_ways(tmp_path, "optional_number", "null") == [(None, None)] * 2
    with pytest.raises(ConfigError):
        parsed("--int_first=null")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--duration=30x", "'30x' is not a duration: write 30s, 30m, 1h30m, 2d or seconds"),
        ("--optional_delta=1:30", "'1:30' is not a duration: write 30s, 30m, 1h30m, 2d or seconds"),
        ("--size=5M", "'5M' is not a size: write 512MiB, 2GB or bytes"),
        ("--dtype=nn", "'nn' is not a dtype of torch: write bfloat16, float32, int64, ..."),
        ("--float_first=abc", "expected number, got 'abc'"),
        ("--float_first=true", "expected number, got 'true'"),
        ("--optional_number={", "expected number, got '{'"),
    ],
)
def test_a_wrong_value_is_refused_in_our_own_words(option: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parsed(option)
    assert str(caught.value) == f"{option.partition('=')[0]}: {message}"


def test_what_is_printed_can_be_fed_back(tmp_path: Path) -> None:
    options = ["--duration=30m", "--durations=[1h, 5]", "--sizes={a: 2GB}", "--delta=90s",
               "--dtype=half", "--float_first=1", "--int_first=1.0"]  # fmt: skip
    values, _, text = parsed(*options)
    path = tmp_path / "printed.yaml"
    path.write_text(text)
    again, _, printed = parsed(file=str(path))
    assert (again, printed) == (values, text)
    assert "- 1h\n- 5\n" in text
    assert "  a: 2GB\n" in text
    default, _, text = parsed()
    assert (default.delta, "delta: 1h30m\n" in text) == (timedelta(minutes=90), True)


def test_a_parsed_timedelta_is_one_and_keeps_its_text_when_it_is_copied() -> None:
    delta = parsed("--delta=90s")[0].delta
    assert isinstance(delta, timedelta)
    for one in (copy.deepcopy(delta), pickle.loads(pickle.dumps(delta))):
        assert one == timedelta(seconds=90)
        parser = ConfigParser(Values, "test")
        assert "delta: 90s\n" in parser.dump(parser.parse([]).namespace, {"delta": one})


def test_the_parameters_of_a_run_take_and_print_them(tmp_path: Path) -> None:
    parser = ConfigParser(BaseTrainerConfig, "test")
    path = tmp_path / "run.yaml"
    path.write_text("device_parameters:\n  timeout_seconds: 1:30:00\n")
    options = ["--training_parameters.max_time=30m", "--training_parameters.grace_seconds=25",
               "--training_parameters.train_steps_per_epoch=1.0",
               "--training_parameters.val_steps_per_epoch=1"]  # fmt: skip
    namespace = parser.parse(["--config", str(path), *options]).namespace
    config, _ = parser.instantiate(namespace)
    training, device = config.training_parameters, config.device_parameters
    assert (training.max_time, training.grace_seconds, device.timeout_seconds) == (1800, 25, 5400)
    for text in (parser.dump(namespace, {}), config_yaml(config)):
        printed = load_yaml(text)
        assert {
            "max_time": "30m", "grace_seconds": 25, "train_steps_per_epoch": 1.0,
            "val_steps_per_epoch": 1,
        }.items() <= printed["training_parameters"].items()  # fmt: skip
        assert "train_steps_per_epoch: 1.0\n" in text
        assert "val_steps_per_epoch: 1\n" in text
        assert printed["device_parameters"]["timeout_seconds"] == "1:30:00"
        assert printed["device_parameters"]["failure_timeout_seconds"] == "20s"


def test_registering_twice_changes_nothing() -> None:
    register_value_types()
    before = dict(jsonargparse.typing.registered_type_handlers)
    register_value_types()
    assert jsonargparse.typing.registered_type_handlers.keys() == before.keys()
    for kind in (Duration, Size, timedelta, torch.dtype):
        assert jsonargparse.typing.registered_type_handlers[kind] is before[kind]
