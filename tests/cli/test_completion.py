"""Tab completion: what is offered, that real shells take it, and that nothing heavy is loaded."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

import pytest
from support import TinyTrainer, tiny

from dream_trainer.callbacks import Callback, ProgressBar, RunSummary
from dream_trainer.cli.candidates import candidates
from dream_trainer.cli.commands import COMMANDS, own_options
from dream_trainer.cli.completion import split_line
from dream_trainer.cli.config_class import config_class_of
from dream_trainer.cli.source_options import RUN_CALLBACKS
from dream_trainer.cli.targets import named_trainer
from dream_trainer.trainer.presets import presets_of

pytestmark = pytest.mark.may_leave("rng")

# The script raises as soon as anyone imports it.
SCRIPT = '''
from __future__ import annotations
import enum
import typing as t
from dataclasses import dataclass, field
import torch
from torch import nn
from dream_trainer import Callback, DreamCLI, DreamTrainerConfig
from parts.base import Base as Parent, Part

raise RuntimeError("this module must not be run")

class Mode(enum.Enum):
    FAST = 1
    SLOW = 2

Kind = t.Literal["small", "very large", None]

class Net(nn.Module):
    def __init__(self, width: int, gated: bool = False): ...

class Deep(Net):
    def __init__(self, *, depth: int = 2, **others): ...

class Ema(Callback):
    def __init__(self, decay: float = 0.9): ...

@dataclass(kw_only=True)
class Config(DreamTrainerConfig):
    lr: float = 0.1
    """Learning rate: of the first step."""
    mode: Mode = Mode.FAST
    kind: Kind = None
    part: Part = field(default_factory=Part)
    both: "t.Optional[bool]" = None
    net: nn.Module = field(default_factory=lambda: Deep())
    optimizer: torch.optim.Optimizer | None = None
    dtype: torch.dtype = torch.float32
    extra: dict[str, Callback] = field(default_factory=lambda: {"early": Ema(), "late": Ema(1.0)})
    derived: int = field(init=False)
    constant: t.ClassVar[int] = 3
    weights: str | None = None

class Trainer(Parent):
    """Trains: a tiny thing."""
    config: Config
    presets = {"quick": len, "overfit": None}

class Other(Parent): ...

if __name__ == "__main__":
    DreamCLI(trainer_class=Trainer)
'''
BASE = """
from dataclasses import dataclass
from dream_trainer import *

@dataclass
class Part:
    size: int = 1
    @dataclass
    class Inner:
        flag: bool = False
    inner: "Part.Inner" = None

class Base(DreamTrainer):
    presets = dict(slow=len)
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "setup.py").write_text("import setuptools")
    (tmp_path / "broken.py").write_text("class Trainer(:")
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "__init__.py").write_text("from .base import Base")
    (tmp_path / "parts" / "base.py").write_text(BASE)
    program = tmp_path / "bin" / "dream-trainer"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\nfrom dream_trainer.cli import main\nmain()\n")
    program.chmod(0o755)
    return tmp_path


def offered(place: Path, line: str) -> list[str]:
    return list(candidates(split_line(line), place).words)


def of_fit(place: Path, line: str) -> list[str]:
    return offered(place, f"dream-trainer fit train:Trainer {line}")


def test_subcommands_and_their_own_options(place: Path) -> None:
    commands = offered(place, "dream-trainer ")
    assert {"fit", "validate", "plan", "checkpoints", "report", "completion"} <= {*commands}
    assert {"benchmark", "profile", "find-graph-breaks"} <= {*commands}
    assert "--cached_batch" in offered(place, "dream-trainer benchmark train:Trainer --")
    assert offered(place, "dream-trainer checkpoints pr") == ["prune"]
    assert offered(place, "dream-trainer checkpoints prune run --mode ") == ["min", "max"]
    assert offered(place, "dream-trainer checkpoints ls --j") == ["--json"]
    assert offered(place, "dream-trainer completion ") == ["bash", "zsh"]
    assert candidates(["dream-trainer", "report", ""], place).files
    assert offered(place, "dream-trainer nothing ") == []


def test_trainers_of_modules_and_files(place: Path) -> None:
    assert offered(place, "dream-trainer fit ") == ["broken:", "parts.", "train:"]
    assert offered(place, "dream-trainer fit parts.") == ["parts.base:"]
    assert offered(place, "dream-trainer fit parts.base:") == ["parts.base:Base"]
    assert offered(place, "dream-trainer fit train.p") == ["train.py:"]
    assert offered(place, "dream-trainer fit ./tr") == ["./train.py:"]
    assert offered(place, "dream-trainer fit train:") == ["train:Trainer", "train:Other"]
    assert offered(place, "dream-trainer fit ./train.py:T") == ["./train.py:Trainer"]
    assert offered(place, "dream-trainer fit broken:") == []


def test_options_one_level_at_a_time(place: Path) -> None:
    top = of_fit(place, "--")
    assert {"--config", "--preset", "--lr", "--part.", "--training_parameters."} <= {*top}
    assert {"--derived", "--constant", "--part.size"}.isdisjoint(top)
    assert of_fit(place, "--part.") == ["--part.size", "--part.inner."]
    assert of_fit(place, "--part.inner.") == ["--part.inner.flag"]
    assert of_fit(place, "--lr 1 --training_parameters.n_") == ["--training_parameters.n_epochs"]
    assert offered(place, "dream-trainer fit train:Nobody --tr") == []
    assert candidates(["dream-trainer", "fit", "train:Trainer", "--lr"], place).words == {
        "--lr": "Learning rate: of the first step."
    }


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--mode ", ["FAST", "SLOW"]),
        ("--mode=S", ["--mode=SLOW"]),
        ("--kind ", ["small", "very large", "null"]),
        ("--both ", ["true", "false", "null"]),
        ("--part.inner.flag ", ["true", "false"]),
        ("--checkpoint_parameters.mode ", ["min", "max"]),
        ("--training_parameters.max_time ", ["null"]),
        ("--dtype bf", ["bfloat16"]),
        ("--net ", ["Deep", "Net"]),
        ("--net.help ", ["Deep", "Net"]),
        ("--optimizer Adam", ["Adam", "AdamW", "Adamax"]),
        ("--callbacks.ema E", ["EMA", "EarlyStopping", "Ema"]),
        ("--callbacks.lr Lea", ["LearningRateMonitor"]),
        ("--callbacks.progress n", ["null"]),
        ("--preset ", ["debug", "slow", "quick"]),
        ("--lr ", []),
    ],
)
def test_values(place: Path, line: str, words: list[str]) -> None:
    found = candidates(split_line(f"dream-trainer fit train:Trainer {line}"), place)
    assert list(found.words) == words
    assert not found.files


@pytest.mark.parametrize("option", ["config", "weights", "root_dir", "part", "unheard.of"])
def test_names_of_files_are_offered_where_a_path_can_stand(place: Path, option: str) -> None:
    assert candidates(["dream-trainer", "fit", "train:Trainer", f"--{option}", ""], place).files


def test_arguments_of_classes_from_defaults_and_from_the_command_line(place: Path) -> None:
    assert of_fit(place, "--net.") == ["--net.depth", "--net.width", "--net.gated", "--net.help"]
    assert of_fit(place, "--net Net --net.") == ["--net.width", "--net.gated", "--net.help"]
    assert "--optimizer.weight_decay" in of_fit(place, "--optimizer AdamW --optimizer.")
    assert of_fit(place, "--extra.l") == ["--extra.late", "--extra.late."]
    assert of_fit(place, "--extra.late.d") == ["--extra.late.decay"]
    assert of_fit(place, "--callbacks.new Ema --callbacks.new.d") == ["--callbacks.new.decay"]
    assert "--callbacks.metrics.every_n_steps" in of_fit(place, "--callbacks.metrics.")


@pytest.mark.parametrize(
    "start",
    [
        "./train.py",
        "python train.py",
        "python3 -u train.py",
        "python -m train",
        "torchrun train.py",
    ],
)
def test_a_script_that_uses_dream_cli(place: Path, start: str) -> None:
    assert offered(place, f"{start} va") == ["validate"]
    assert offered(place, f"{start} fit --mode ") == ["FAST", "SLOW"]
    assert offered(place, f"{start} fit --callbacks.met")[0] == "--callbacks.metrics"


@pytest.mark.parametrize("line", ["python setup.py ", "python ", "python setup.py train.py ", "ls"])
def test_other_programs_are_left_to_others(place: Path, line: str) -> None:
    assert not candidates(split_line(line), place).ours


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("a b", ["a", "b"]),
        ("a b ", ["a", "b", ""]),
        ("a 'b c", ["a", "b c"]),
        ('a "b ', ["a", "b "]),
        ("a b\\ ", ["a", "b "]),
        ("", [""]),
    ],
)
def test_a_line_is_split_as_a_shell_does(line: str, words: list[str]) -> None:
    assert split_line(line) == words


def test_the_source_tells_what_the_imported_classes_have(tmp_path: Path) -> None:
    trainer = named_trainer("support:TinyTrainer", Path(__file__).parents[1])
    assert trainer is not None
    assert trainer.presets() == list(presets_of(TinyTrainer))

    def compare(path: str, config: type) -> int:
        shown = {one.name: one for one in trainer.options(path, {})}
        assert set(shown) == {one.name for one in fields(config) if one.init}, path
        hints = get_type_hints(config, localns={"Callback": Callback})
        below = {name: kind for name, kind in hints.items() if is_dataclass(kind)}
        assert {name for name, one in shown.items() if one.values.section} == set(below), path
        return 1 + sum(compare(f"{path}.{name}".lstrip("."), kind) for name, kind in below.items())

    assert compare("", config_class_of(TinyTrainer)) == 4
    made = tiny(tmp_path, callbacks={"summary": RunSummary(), "progress": ProgressBar()}).callbacks
    kinds = {name: type(made[name]) for name in made}
    assert {n: f"{kind.__module__}.{kind.__name__}" for n, kind in kinds.items()} == RUN_CALLBACKS


def test_the_options_of_plan_are_those_of_its_help(place: Path) -> None:
    told = set(re.findall(r"--[a-z_]+", own_options(COMMANDS["plan"], "plan").format_help()))
    assert told >= {"--ranks", "--ranks_per_node", "--json", "--preset", "--debug"}
    assert told <= {*offered(place, "dream-trainer plan train:Trainer --")}


def test_help_and_completion_load_neither_torch_nor_lightning(place: Path) -> None:
    program = """
import os, sys
from dream_trainer.cli import main
for words in (["--help"], ["completion", "bash"], ["completion", "zsh", "--candidates"]):
    try:
        main(words)
    except SystemExit as end:
        assert not end.code
heavy = {"torch", "lightning", "jsonargparse", "rich", "numpy"}
print("LOADED", sorted(heavy & sys.modules.keys()))
"""
    line = "dream-trainer fit train:Trainer --optimizer Adam --net.help D"
    environment = os.environ | {"DREAM_TRAINER_COMPLETION_LINE": line}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout.splitlines()[-3:] == ["words", "Deep", "LOADED []"]


SHELLS = {
    "bash": (["bash", "--norc", "--noprofile", "-i"], "_old() { COMPREPLY=(setup.cfg); }"),
    "zsh": (
        ["zsh", "-f", "-i"],
        "bindkey -e; bindkey '^I' complete-word; autoload -Uz compinit; compinit -u -D;"
        "_old() { compadd setup.cfg; }",
    ),
}
BEFORE = {"bash": "complete -F _old python", "zsh": "compdef _old python"}


@pytest.mark.parametrize("shell", SHELLS)
def test_a_real_shell_completes(place: Path, shell: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell} here")
    program, start = SHELLS[shell]
    environment = os.environ | {
        "PATH": f"{place / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(one for one in sys.path if one),
        "TERM": "dumb",
        "HOME": str(place),
    }
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(place)
        os.execvpe(program[0], program, environment)
    try:
        script = f"source <(dream-trainer completion {shell} python train.py)"
        # A terminal so wide that no line is broken.
        typed(terminal, f"stty columns 400; {start}; {BEFORE[shell]}; {script}; echo '<'1 .\n")
        became = [
            typed(terminal, f"{keys}\x01echo '<'1 \n")
            for keys in (
                "dream-trainer fit trai\tTr\t --kind=v\t",
                "FOO=1 bin/dream-trainer 'fit\t train:Trainer --part.s\t3",
                "./train.py fit --checkpoint_parameters.on\tt\t",
                "python setup.\t",
            )
        ]
    finally:
        os.close(terminal)
        os.waitpid(child, 0)
    assert became == [
        "dream-trainer fit train:Trainer --kind=very large",
        "FOO=1 bin/dream-trainer fit train:Trainer --part.size 3",
        "./train.py fit --checkpoint_parameters.on_interrupt true",
        "python setup.cfg",
    ]


def typed(terminal: int, keys: str) -> str:
    """What a shell prints behind ``<1`` after some keys."""
    os.write(terminal, keys.encode())
    said, end = "", time.monotonic() + 60
    while not (found := re.search(r"<1 (.*?)\s*\r?\n", said)):
        assert select.select([terminal], [], [], max(0.0, end - time.monotonic()))[0], said
        said += os.read(terminal, 65536).decode(errors="replace")
    return found[1]
