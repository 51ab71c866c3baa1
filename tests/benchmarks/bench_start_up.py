"""How long a program takes to answer, against ``import torch`` alone.

    python tests/benchmarks/bench_start_up.py [--rounds 15]

Each round runs every program once, in turn, so that all of them meet the same noise of the machine.
What is left of the time of ``import torch`` is reading options, the configuration and its help; the
last program shows what a trainer costs, which needs Fabric.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

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
PROGRAMS = {
    "import torch": ["-c", "import torch"],
    "train.py --help": ["train.py", "--help"],
    "train.py fit --help": ["train.py", "fit", "--help"],
    "train.py fit --print_config": ["train.py", "fit", "--width", "3", "--print_config"],
    "train.py fit --widht 3": ["train.py", "fit", "--widht", "3"],
    "import lightning.fabric": ["-c", "import lightning.fabric"],
}


def seconds(words: list[str], folder: Path) -> float:
    # Compiled modules are kept, as after an installation.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, *words]
    start = time.perf_counter()
    subprocess.run(command, cwd=folder, env=environment, capture_output=True, check=False)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    taken: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    with tempfile.TemporaryDirectory(prefix="bench-start-up-") as folder:
        Path(folder, "train.py").write_text(TRAIN, encoding="utf-8")
        for number in range(options.rounds + 1):
            for name, words in PROGRAMS.items():
                time_taken = seconds(words, Path(folder))
                if number:  # the first round fills the caches of the file system
                    taken[name].append(time_taken)
    torch_alone = taken["import torch"]
    print(f"medians of {options.rounds} rounds; ratios are those within a round")
    print(f"{'':28}{'time':>8}{'ratio':>8}{'fastest':>9}")
    for name, values in taken.items():
        ratio = statistics.median(a / b for a, b in zip(values, torch_alone, strict=True))
        fastest = min(values) / min(torch_alone)
        print(f"{name:28}{statistics.median(values):7.2f}s{ratio:8.2f}{fastest:9.2f}")


if __name__ == "__main__":
    main()
