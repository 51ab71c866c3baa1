"""A user's program, and a process for each of its command lines.

Each is forked from a server, which has loaded torch and nothing of the tests: starting Python
takes seconds, and classes of other tests would be among those that a short name can mean.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dream_trainer.configs.yaml_text import load_yaml

# Once, here: each process would load them for itself.
for _name in ("dream_trainer.world.dream_world", "dream_trainer.cli.config_parser"):
    importlib.import_module(_name)

TRAIN = '''
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from jsonargparse import lazy_instance
from torch import nn
from torch.utils.data import DataLoader, Dataset

from dream_trainer import *
from dream_trainer.trainer.presets import debug


class Data(Dataset):
    """Points whose value is their sum."""

    def __init__(self, size: int = 16, width: int = 2):
        self.size, self.width = size, width
        self.x = torch.rand(size, width, generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return self.x[index], self.x[index].sum(0, keepdim=True)


class Net(nn.Module):
    """A hidden layer.

    Args:
        width: of the input.
        hidden: of the layer.
    """

    def __init__(self, width: int = 2, hidden: int = 4, dropout: float = 0.0):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, hidden), nn.Dropout(dropout), nn.Linear(hidden, 1)
        )

    def forward(self, x):
        return self.layers(x)


class Flat(nn.Module):
    """No hidden layer."""

    def __init__(self, width: int = 2, bias: bool = True):
        super().__init__()
        self.layer = nn.Linear(width, 1, bias=bias)

    def forward(self, x):
        return self.layer(x)


class Early(Callback):
    def __init__(self, patience: int = 3, mode: str = "min") -> None:
        self.patience, self.mode = patience, mode


class Average(Callback):
    def __init__(self, decay: float = 0.9) -> None:
        self.decay = decay


Optimize = Callable[[Any], torch.optim.Optimizer]
Schedule = Callable[[Any], torch.optim.lr_scheduler.LRScheduler]


@dataclass(kw_only=True)
class Config(DreamTrainerConfig):
    """A small regression."""

    data: Dataset = field(default_factory=lambda: lazy_instance(Data, size=16))
    """Points to fit."""
    model: nn.Module = field(default_factory=lambda: lazy_instance(Net, hidden=3))
    """What fits them."""
    optimizer: Optimize = torch.optim.SGD
    """How it learns."""
    scheduler: Schedule | None = None
    """How its rate goes."""
    batch_size: int = 4
    """Points a batch."""
    twice: int = 0
    """Twice the batch."""
    note: str = ""
    """Any words."""
    dtype: torch.dtype = torch.float32
    """Of the weights."""
    training_parameters: TrainingParameters = field(
        default_factory=lambda: TrainingParameters(n_epochs=2)
    )
    device_parameters: DeviceParameters = field(
        default_factory=lambda: DeviceParameters(accelerator="cpu")
    )
    callbacks: dict[str, Callback | None] = field(
        default_factory=lambda: {"progress": None}
    )


def long(config: Config) -> Config:
    """More epochs, and callbacks of their own."""
    from dataclasses import replace

    training = replace(config.training_parameters, n_epochs=7, max_steps=70)
    return replace(config, training_parameters=training, note="long", batch_size=8)


class Trainer(DreamTrainer):
    config: Config
    presets = {"long": long}
    links = (
        Link("data.width", "model.init_args.width", apply_on="instantiate"),
        Link("batch_size", "twice", lambda size: 2 * size),
    )

    def configure_models(self):
        self.model = self.config.model.to(self.config.dtype)

    def configure_optimizers(self):
        return self.config.optimizer(self.model.parameters())

    def configure_schedulers(self):
        make = self.config.scheduler
        return None if make is None else make(self.named_optimizers()["model"])

    def configure_dataloaders(self):
        data, size = self.config.data, self.config.batch_size
        return DataLoader(data, batch_size=size, shuffle=True), DataLoader(data, batch_size=size)

    def test_dataloader(self):
        return DataLoader(self.config.data, batch_size=self.config.batch_size)

    predict_dataloader = test_dataloader

    def predict_step(self, batch, batch_idx):
        return self.model(batch[0])

    def compute_loss(self, batch, batch_idx):
        x, y = batch
        return (self.model(x.to(self.config.dtype)) - y).square().mean()


if __name__ == "__main__":
    DreamCLI(Trainer)
'''


@dataclass(frozen=True)
class Ended:
    """A process that has ended."""

    status: int
    out: str
    err: str


def in_a_process(function: Callable[[], object], time_limit: float = 60.0) -> Ended:
    """Call a function in a forked process, with output, exit status and environment of its own."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child == 0:
            _end(function, out.fileno(), err.fileno(), time_limit)
        _, status = os.waitpid(child, 0)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode())
    return Ended(os.waitstatus_to_exitcode(status), *texts)


def run_script(path: Path | str, *words: str, **variables: str) -> Ended:
    """``python path words``, with some environment variables."""
    return server().run([str(path), *words], variables)


def run_command(*words: str, **variables: str) -> Ended:
    """``dream-trainer words``, with some environment variables."""
    return server().run(["dream-trainer", *words], variables)


class Server:
    """Runs command lines in forks of a process of its own."""

    def __init__(self) -> None:
        command = [sys.executable, str(Path(__file__).resolve())]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, words: list[str], variables: dict[str, str]) -> Ended:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = (words, str(Path.cwd()), {**os.environ, **variables})
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return Ended(*json.loads(self._process.stdout.readline()))

    def end(self) -> None:
        self._process.communicate()  # its loop ends with its input


@functools.cache
def server() -> Server:
    """The one of this session."""
    return Server()


def _serve() -> None:
    """Run the command line of each line of input."""
    sys.path.remove(str(Path(__file__).resolve().parent))
    for line in sys.stdin:
        done = in_a_process(functools.partial(_run, *json.loads(line)))
        print(json.dumps([done.status, done.out, done.err]), flush=True)


def _run(words: list[str], folder: str, environment: dict[str, str]) -> None:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = words
    if words[0] == "dream-trainer":
        from dream_trainer.cli import main

        main()
        return
    sys.path.insert(0, str(Path(words[0]).resolve().parent))
    runpy.run_path(words[0], run_name="__main__")


def write(name: str, text: str) -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text, encoding="utf-8")
    return name


def fit(*words: str, **variables: str) -> Ended:
    return run_script("train.py", "fit", *words, **variables)


def printed(*words: str, **variables: str) -> Any:
    done = fit(*words, "--print_config", **variables)
    assert done.status == 0, done.err
    return load_yaml(done.out)


def refused(*words: str, **variables: str) -> str:
    done = fit(*words, **variables)
    assert (done.status, done.out) == (2, "")
    assert "Traceback" not in done.err
    assert not Path("runs").exists()
    return done.err


def _end(function: Callable[[], object], out: int, err: int, time_limit: float) -> None:
    """In the child: run, and end as Python would; what pytest has at exit is not ours."""
    import signal

    status: Any = 1
    try:
        signal.alarm(round(time_limit))  # ends a process that hangs
        # pytest keeps what is printed in objects of its own: write to the descriptors.
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        function()
        status = 0
    except SystemExit as end:
        status = end.code if end.code is not None else 0
    except BaseException:  # noqa: BLE001  the traceback goes where Python would print it
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 1)


if __name__ == "__main__":
    _serve()
