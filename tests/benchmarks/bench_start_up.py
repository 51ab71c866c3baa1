"""How long a program takes to answer, against ``import torch`` alone.

    python tests/benchmarks/bench_start_up.py [--rounds 15]

What is left of the time of ``import torch`` is reading options, the configuration and its help; the
last program shows what a trainer costs, which needs Fabric.
"""

from __future__ import annotations

import argparse
import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from rounds import Spread, Target, interleaved, per_round, report, seconds

TRAIN = '''
from dataclasses import dataclass

import torch
from torch import nn

from dream_trainer import DreamCLI, DreamTrainer, DreamTrainerConfig


@dataclass(kw_only=True)
class Config(DreamTrainerConfig):
    width: int = 8
    """Width of the hidden layer."""
    lr: float = 1e-2
    """Learning rate."""


class Trainer(DreamTrainer):
    config: Config

    def configure_models(self):
        self.net = nn.Sequential(nn.Linear(4, self.config.width), nn.Linear(self.config.width, 1))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.net.parameters(), lr=self.config.lr)

    def configure_dataloaders(self):
        return [torch.zeros(2, 4)], None

    def compute_loss(self, batch, batch_idx):
        return self.net(batch).square().mean()


if __name__ == "__main__":
    DreamCLI(Trainer)
'''
#: Name -> the words after ``python``, the file's folder being the current one.
TORCH, NOTHING, OURS = "import torch", "nothing", "import dream_trainer"
PROGRAMS = {
    NOTHING: ["-c", "pass"],
    OURS: ["-c", "import dream_trainer"],
    TORCH: ["-c", "import torch"],
    "train.py --help": ["train.py", "--help"],
    "train.py fit --help": ["train.py", "fit", "--help"],
    "train.py fit --print_config": ["train.py", "fit", "--width", "3", "--print_config"],
    "train.py fit --widht 3": ["train.py", "fit", "--widht", "3"],
    "dream-trainer --help": ["-m", "dream_trainer", "--help"],
    "import lightning.fabric": ["-c", "import lightning.fabric"],
}


def run(words: list[str], folder: str) -> None:
    """Run a program to its end."""
    # Compiled modules are kept, as after an installation.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, *words]
    subprocess.run(command, cwd=folder, env=environment, capture_output=True, check=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-start-up-") as folder:
        Path(folder, "train.py").write_text(TRAIN, encoding="utf-8")
        ways = {
            name: functools.partial(seconds, functools.partial(run, words, folder))
            for name, words in PROGRAMS.items()
        }
        times = interleaved(ways, options.rounds)
    print(f"{'':28}{'seconds':>28}{'of import torch':>28}")
    values = {}
    for name, taken in times.items():
        of_torch = per_round(lambda mine, alone: mine / alone, taken, times[TORCH])
        values[name] = {"seconds": Spread.of(taken), "of_torch": of_torch}
        print(f"{name:28}{values[name]['seconds']!s:>28}{of_torch!s:>28}")
    own = per_round(lambda ours, alone: ours - alone, times[OURS], times[NOTHING])
    report("start_up", values, [Target("import dream_trainer, seconds", own, 0.030)])


if __name__ == "__main__":
    main()
