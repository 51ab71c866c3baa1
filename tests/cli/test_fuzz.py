"""Generated wrong configurations: each ends with status 2 and a short message, and starts nothing.

FUZZ_SEED repeats a draw. ``nox -s faults`` makes 6,000 of them, the normal tests some hundreds.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import string
from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from programs import in_a_process, write
from torch import nn

from dream_trainer import (
    Callback,
    DreamCLI,
    DreamTrainerConfig,
    TrainingParameters,
)

_SEED = int(os.environ.get("FUZZ_SEED") or random.randrange(1_000_000))
#: Longer than that is no short message, whatever is wrong.
_MOST_LINES, _MOST_LETTERS = 24, 6_000


class Blend(Callback):
    def __init__(self, decay: float = 0.9) -> None:
        self.decay = decay


class Grid(nn.Module):
    def __init__(self, hidden: int = 4) -> None:
        super().__init__()


@dataclass(kw_only=True)
class Shape:
    hidden: int | None = 4
    """Width."""
    act: str = "relu"
    """Activation."""


@dataclass(kw_only=True)
class Config(DreamTrainerConfig):
    rate: float = 1e-3
    """Learning rate."""
    sizes: list[int] = field(default_factory=list)
    """Sizes."""
    weights: dict[str, float] = field(default_factory=lambda: {"a": 1.0})
    """Weights."""
    shape: Shape = field(default_factory=Shape)
    """A section."""
    net: nn.Module | None = None
    """A class."""
    training_parameters: TrainingParameters = field(
        default_factory=lambda: TrainingParameters(n_epochs=1)
    )


class Trainer:
    """Nothing of it may be made."""

    config: Config

    def __init__(self, config: Config) -> None:
        raise AssertionError("a wrong configuration made a trainer")


def names_of(kind: Any, above: str = "") -> list[str]:
    hints = get_type_hints(kind)
    found = []
    for one in fields(kind):
        found.append(f"{above}{one.name}")
        if is_dataclass(hints[one.name]):
            found += names_of(hints[one.name], f"{above}{one.name}.")
    return found


KNOWN = names_of(Config)
SECTIONS = [name for name in KNOWN if any(one.startswith(f"{name}.") for one in KNOWN)]
LEAVES = [name for name in KNOWN if name not in SECTIONS]
#: What is no value of an option: of which type it is, and which values are wrong for it.
WRONG: dict[str, list[Any]] = {
    "rate": ["fast", [1], {"a": 1}, "1e", "", "0x", True, None],
    "sizes": ["3", 3, {"a": 1}, ["a"], [1.5], [[1]], [None]],
    "weights": ["a", 1, [1], {"a": "b"}, {"a": [1]}],
    "seed": ["x", 1.5, [1], {}, "1e", True, -1],
    "net": ["Nott", "nn.Linear", "torch.nn", "os.system", 3, [1], {"a": 1}, {"class_path": 3}],
    "shape.hidden": ["x", 1.5, [1], "1.0", True],
    "callbacks": ["x", 3, [1], {"a": 3}, {"a": "Blen"}, {"a": {"class_path": "Grid"}}],
    "training_parameters.n_epochs": [0, -1, 1.5, "x", "1.0", [2], True, 10.0, float("nan")],
    "training_parameters.max_steps": [0, "many", 1.5, float("inf"), {}, True],
    "training_parameters.max_time": ["30x", "-1s", [1], {}, "1:2:3:4:5", 0],
    "training_parameters.gradient_clip_val": ["x", -1, [1]],
    "training_parameters.train_steps_per_epoch": [0, 1.5, -0.5, "all", 2.0, float("nan")],
    "training_parameters.on_nonfinite": ["explode", 3, None],
    "training_parameters.deterministic": ["maybe", 3, [True]],
    "checkpoint_parameters.mode": ["mix", 3, None, ["min"]],
    "checkpoint_parameters.keep_last": [0, "x", 1.5, None],
    "device_parameters.dp_shard": ["all", 0, -2, 1.5, True],
    "device_parameters.timeout_seconds": ["soon", -1, [3]],
    "experiment": ["a/b", "..", [1], {"a": 1}],
}
ODD = [
    "ü",
    "名前",
    "\u202e",
    "\u200b",
    "🙂",
    "é",
    "\x7f",
    "a b",
    "a\tb",
    "%s",
    "{}",
    "\\",
    "'",
    '"',
    "#",
]


@dataclass
class Line:
    """A command line and what it needs."""

    words: list[str] = field(default_factory=list)
    variables: dict[str, str] = field(default_factory=dict)
    files: dict[str, str | bytes] = field(default_factory=dict)

    def file(self, content: str | bytes) -> str:
        name = f"file-{len(self.files) + 1}.yaml"
        self.files[name] = content[:200]
        if isinstance(content, bytes):
            Path(name).write_bytes(content)
        else:
            write(name, content)
        return name


def nested(name: str, value: Any) -> dict[str, Any]:
    for part in reversed(name.split(".")):
        value = {part: value}
    return value


def give(draw: random.Random, line: Line, name: str, value: Any) -> None:
    """Put a value into a file, a variable or an option."""
    where = draw.choice(("file", "option", "variable"))
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if where == "variable" and (name.isascii() and "\0" not in text):
        line.variables["DREAM_TRAINER_" + name.upper().replace(".", "__")] = text
    elif where == "option":
        line.words.append(f"--{name}={text}")
    else:
        line.words += ["--config", line.file(json.dumps(nested(name, value), ensure_ascii=False))]


def typo(draw: random.Random, name: str) -> str:
    """A name that is no option."""
    while True:
        at = draw.randrange(len(name))
        letter = draw.choice(string.ascii_lowercase + "_")
        made = draw.choice((name[:at] + name[at + 1 :], name[:at] + letter + name[at:], name + "s"))
        inside = any(made.startswith(f"{one}.") for one in ("weights", "callbacks", "loggers"))
        if made not in KNOWN and made and made[0] not in "._" and made[-1] != "." and not inside:
            return made


def wrong_key(draw: random.Random, line: Line) -> None:
    give(draw, line, typo(draw, draw.choice(LEAVES)), draw.choice([1, "a", None, [1], {"b": 2}]))


def wrong_value(draw: random.Random, line: Line) -> None:
    name = draw.choice(list(WRONG))
    value = draw.choice(WRONG[name])
    text_is_a_number = isinstance(value, str) and value in ("3", "1.0")
    # A variable or an option is text: what null or 3 means there is up to the type.
    if name in ("experiment", "callbacks", "net") or not isinstance(value, str) or text_is_a_number:
        line.words += ["--config", line.file(json.dumps(nested(name, value)))]
    else:
        give(draw, line, name, value)


def broken_file(draw: random.Random, line: Line) -> None:
    good = "rate: 0.1\nshape: {hidden: 3, act: tanh}\nsizes: [1, 2]\nweights:\n  a: 1\n"
    content: str | bytes = draw.choice(
        [
            good
            + draw.choice(
                ["shape: {", "sizes: [1", "'", '"', "a: b: c", "\t- x", "- 1", "? [", "*x"]
            ),
            good.replace("sizes", draw.choice(["rate", "shape"])),
            bytes(draw.randrange(128, 256) for _ in range(draw.randrange(1, 40))),
            good.encode() + b"note: \xff\xfe",
            good.encode("utf-16"),
            draw.choice(["- 1\n- 2", "3", "text", "[]", "true", "2020-01-01"]),
            "shape: !!python/object/apply:os.system [true]",
            good + "--- \nrate: 3",
            "\0",
        ]
    )
    line.words += ["--config", line.file(content)]


def cycle(draw: random.Random, line: Line) -> None:
    kind = draw.randrange(3)
    if kind == 0:
        line.words += ["--config", line.file("shape: &s\n  hidden: 3\n  act: *s")]
    elif kind == 1:
        line.words += ["--config", line.file("sizes: &s [1, *s]")]
    else:
        count, first = draw.randrange(1, 5), len(line.files) + 1
        for n in range(count):
            line.file(f"rate: 0.1\n_base_: file-{first + (n + 1) % count}.yaml")
        line.words += ["--config", f"file-{first}.yaml"]


def deep(draw: random.Random, line: Line) -> None:
    depth = draw.choice([5, 50, 500, 5000])
    start, end = draw.choice([("[", "]"), ("{a: ", "}")])
    name = draw.choice(["sizes", "shape", "nothing", "rate", "callbacks", "net"])
    text = start * depth + "x" + end * depth
    if draw.random() < 0.3 and depth < 500:
        line.words.append(f"--{name}={text}")
    else:
        line.words += ["--config", line.file(f"{name}: {text}")]


def odd_letters(draw: random.Random, line: Line) -> None:
    word = "".join(draw.choice(ODD) for _ in range(draw.randrange(1, 5)))
    kind = draw.randrange(4)
    if kind == 0:
        line.words += ["--config", line.file(json.dumps({word: 1}, ensure_ascii=False))]
    elif kind == 1:
        line.words.append(f"--{word}=1")
    elif kind == 2:
        line.words += ["--shape.hidden", word]
    else:
        content = json.dumps({"training_parameters": {"n_epochs": word}}, ensure_ascii=False)
        line.words += ["--config", line.file(content)]


def wrong_class(draw: random.Random, line: Line) -> None:
    # Each of its own name, or the arguments of one would complete another.
    callback = f"callbacks.x{len(line.files)}"
    name = draw.choice(["net", callback])
    spec: Any = draw.choice(
        [
            {"class_path": "gone.Grid"},
            {"class_path": "Grid.", "init_args": {}},
            {"class_path": ""},
            {"class_path": ["Grid"]},
            {"class_path": "torch.nn.Linear", "init_args": {"wrong": 1}},
            {"class_path": "Blend", "init_args": {"decay": "x"}},
            {"class_path": "Blend", "init_args": [1]},
            {"class_path": "os.getcwd"},
            {"init_args": {"decay": 1}},
            "Blends",
            "torch.optim.SGD",
        ]
    )
    if name == "net" and isinstance(spec, dict) and spec.get("class_path") == "Blend":
        name = callback
    line.words += ["--config", line.file(json.dumps(nested(name, spec)))]


def wrong_section(draw: random.Random, line: Line) -> None:
    value = draw.choice([3, 1.5, True, [1], "text", [{"n_epochs": 3}]])
    line.words += ["--config", line.file(json.dumps(nested(draw.choice(SECTIONS), value)))]


def wrong_words(draw: random.Random, line: Line) -> None:
    line.words += draw.choice(
        [
            ["stray"],
            ["--"],
            ["---rate", "3"],
            ["--rate"],
            ["--config"],
            ["--config", "gone.yaml"],
            ["--config", "."],
            ["--config", ""],
            ["--preset", "nothing"],
            ["--then", "nothing"],
            ["--shape", "gone.yaml"],
            ["--rate", "1", "2"],
            ["-r", "3"],
            ["--=3"],
            ["--.=3"],
            ["--shape..hidden=3"],
            ["--shape.=3"],
        ]
    )


MISTAKES: list[Callable[[random.Random, Line], None]] = [
    wrong_key,
    wrong_value,
    broken_file,
    cycle,
    deep,
    odd_letters,
    wrong_class,
    wrong_section,
    wrong_words,
]


def good(draw: random.Random, line: Line) -> None:
    line.words += draw.choice([[], ["--group", "g"], ["--project=p"], ["--root_dir=r"]])


def check(seed: int) -> None:
    """One command line with one to three mistakes."""
    draw = random.Random(seed)
    line = Line()
    good(draw, line)
    mistakes = draw.choices(MISTAKES, k=draw.choice([1, 1, 1, 2, 3]))
    for mistake in mistakes:
        mistake(draw, line)
    before = dict(os.environ)
    os.environ.update(line.variables)
    out, err = io.StringIO(), io.StringIO()
    status: object = "no exit"
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            DreamCLI(Trainer, ["fit", *line.words], prog="train.py {}")  # type: ignore[arg-type]
    except SystemExit as end:
        status = end.code
    except BaseException as error:
        error.add_note(f"seed {seed}: {line.words} {line.variables} {line.files}")
        raise
    finally:
        os.environ.clear()
        os.environ.update(before)
    said = err.getvalue()
    found = f"seed {seed}: {line.words} {line.variables} {line.files} -> {status}\n{said[:5000]}"
    assert status == 2, found
    assert said.startswith("train.py: error: "), found
    assert "Traceback" not in said, found
    assert len(said.splitlines()) <= _MOST_LINES, found
    assert len(said) <= _MOST_LETTERS, found
    assert not Path("runs").exists(), found


def check_many(first: int, count: int) -> None:
    for seed in range(first, first + count):
        check(seed)


def many(chunk: int, count: int) -> None:
    print(f"FUZZ_SEED={_SEED}")
    first = _SEED * 1_000_000 + chunk * count
    done = in_a_process(lambda: check_many(first, count), time_limit=170)
    assert done.status == 0, done.err


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("chunk", range(2))
def test_wrong_configurations_end_with_a_message(chunk: int) -> None:
    many(chunk, 80)


@pytest.mark.faults
@pytest.mark.parametrize("chunk", range(2, 22))
def test_thousands_of_wrong_configurations_end_with_a_message(chunk: int) -> None:
    many(chunk, 300)
