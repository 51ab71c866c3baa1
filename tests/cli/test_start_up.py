"""What a program loads before it has a trainer: torch, and nothing that takes as long again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

#: Each takes a good part of the time that torch itself takes, or more.
SLOW = (
    "lightning",
    "torchmetrics",
    "torchvision",
    "matplotlib",
    "scipy",
    "pandas",
    "sympy",
    "rich",
    "torch._dynamo",
    "torch._inductor",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
)

TRAIN = '''
from dataclasses import dataclass

import torch

from dream_trainer import (
    Callback, CheckpointParameters, DeviceParameters, DreamCLI, DreamTrainer, DreamTrainerConfig,
    MetricLogger, TrainingParameters,
)


class Ema(Callback):
    def __init__(self, decay: float = 0.9) -> None:
        self.decay = decay


@dataclass(kw_only=True)
class Config(DreamTrainerConfig):
    width: int = 8
    """Width of the hidden layer."""


class Trainer(DreamTrainer):
    config: Config

    def __init__(self, config, **arguments):
        raise AssertionError("nothing asked for a trainer")
'''

#: Names of the package that are made of something slow.
MADE_OF_IT = (
    "Benchmark",
    "Checkpointer",
    "CompileReport",
    "DreamFabric",
    "DreamWorld",
    "LightningModuleTrainer",
    "LightningModuleTrainerConfig",
    "MeshStrategy",
    "ProfiledRun",
    "ResumableRun",
    "RunPlan",
    "benchmark",
    "export_checkpoint",
    "find_graph_breaks",
    "plan_run",
    "profile_run",
)

#: Commands that end before there is a trainer, with how they end.
COMMANDS = (
    ("--help", 0),
    ("fit --help", 0),
    ("validate --help", 0),
    ("fit --width 3 --print_config", 0),
    ("fit --callbacks.ema Ema --callbacks.ema.decay 0.5 --print_config", 0),
    ("fit --widht 3", 2),
    ("fit --width wide", 2),
    ("fit --device_parameters.precision 33-true", 2),
)

PROGRAM = """
import sys
import torch
known = set(sys.modules)


def look(what):
    for name in {slow!r}:
        if name in sys.modules and name not in known:
            print("LOADED", name, "by", what)
            known.add(name)


import dream_trainer
for name in dream_trainer.__all__:
    if name not in {made_of_it!r}:
        getattr(dream_trainer, name)
        look(name)
from train import DreamCLI, Trainer
for command, status in {commands!r}:
    try:
        DreamCLI(Trainer, command.split(), prog="train.py {{}}")
    except SystemExit as end:
        assert end.code == status, (command, end.code)
    look(command)
import random
random.seed(1)
before = random.getstate()
dream_trainer.ProgressBar()
print("DRAWN" if random.getstate() != before else "NOT DRAWN")
print("DONE")
"""


def test_help_configurations_and_mistakes_load_torch_and_nothing_slow(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(TRAIN)
    program = PROGRAM.format(commands=COMMANDS, slow=SLOW, made_of_it=MADE_OF_IT)
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    lines = done.stdout.splitlines()
    assert lines[-1:] == ["DONE"], done.stderr
    assert [line for line in lines if line.startswith("LOADED")] == []
    # rich is loaded late, which may not shift the numbers of a program that has seeded itself.
    assert "NOT DRAWN" in lines
    assert "Width of the hidden layer." in done.stdout  # the help was that of the configuration
