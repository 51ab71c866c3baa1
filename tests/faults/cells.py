"""Trains eight small runs twice: straight, and killed with SIGKILL in an epoch and started again.

    python tests/faults/cells.py [--ranks 2]

Compares the final weights of the two bit for bit and prints a table of eight cells; exit status 1
if any differs. The data come from a plain ``DataLoader(shuffle=True)``.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dream_trainer import (
    Callback,
    CheckpointParameters,
    DeviceParameters,
    DreamTrainer,
    DreamTrainerConfig,
    TrainingParameters,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where the driver's imports are
from driver import KILLED, Processes

CELLS = {
    "plain": {"dropout": 0.0, "augment": False},
    "dropout": {"dropout": 0.3, "augment": False},
    "random augmentation": {"dropout": 0.0, "augment": True},
    "both": {"dropout": 0.3, "augment": True},
}
WORKERS = (0, 2)
SAMPLES, BATCH_SIZE, EPOCHS, SAVE_EVERY = 96, 8, 3, 3
WIDTH = 22


class Waves(Dataset[tuple[Tensor, Tensor]]):
    """Points of a wave; augmentation draws from Python's, numpy's and torch's global streams."""

    def __init__(self, samples: int, augment: bool) -> None:
        self.x = torch.linspace(-3, 3, samples).unsqueeze(1)
        self.augment = augment

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x = self.x[index]
        y = x.sin()
        if self.augment:
            x = x + 0.1 * random.random() + 0.1 * float(np.random.rand()) + 0.1 * torch.rand(1)
        return x, y


class CellTrainer(DreamTrainer):
    def __init__(self, config: DreamTrainerConfig, cell: str, workers: int, samples: int) -> None:
        super().__init__(config)
        self.options, self.workers, self.samples = CELLS[cell], workers, samples

    def configure_models(self) -> None:
        dropout = nn.Dropout(self.options["dropout"])
        self.net = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), dropout, nn.Linear(32, 1))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.net.parameters(), lr=0.01)

    def configure_dataloaders(self) -> Any:
        data = Waves(self.samples, bool(self.options["augment"]))
        return DataLoader(data, BATCH_SIZE, shuffle=True, num_workers=self.workers), None

    def compute_loss(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return (self.net(x) - y).square().mean()


class Kill(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def post_optimizer_step(self, trainer: Any, optimizer: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class Report(Callback):
    """Writes down where the process started to train."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def pre_fit(self, trainer: Any) -> None:
        if trainer.world.is_global_zero:
            self.path.write_text(str(trainer.global_step))


def train(root: Path, name: str, cell: str, workers: int, kill_at: int | None) -> None:
    """What each process does; ends with its weights in ``NAME.weights-RANK``."""
    log = os.open(root / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    config = DreamTrainerConfig(
        root_dir=str(root),
        experiment=name,
        device_parameters=DeviceParameters(accelerator="cpu"),
        training_parameters=TrainingParameters(n_epochs=EPOCHS),
        checkpoint_parameters=CheckpointParameters(every_n_steps=SAVE_EVERY),
        callbacks={
            "progress": None,
            "report": Report(root / f"{name}.start"),
            "kill": Kill(kill_at) if kill_at else None,
        },
    )
    trainer = CellTrainer(config, cell, workers, SAMPLES * ranks)
    trainer.fit()
    weights = [value.numpy().tobytes() for value in trainer.net.state_dict().values()]
    (root / f"{name}.weights-{trainer.world.rank}").write_bytes(b"".join(weights))


def is_exact(cell: str, workers: int, ranks: int = 1) -> bool:
    """Train one cell three times: straight, until it is killed, and from there to the end.

    Raises:
        RuntimeError: a process ended in another way than it should, or resumed nothing.
    """
    steps = EPOCHS * SAMPLES // BATCH_SIZE
    kill_at = steps // 2 + 2  # inside the second of three epochs, and steps behind a checkpoint
    with tempfile.TemporaryDirectory(prefix="cells-") as folder:
        root = Path(folder)
        for name, at, expected in (
            ("straight", None, 0),
            ("killed", kill_at, KILLED),
            ("killed", None, 0),
        ):
            codes = Processes(train, root, name, cell, workers, at, ranks=ranks).wait()
            # Under SIGKILL a rank may see the others die before its own turn comes.
            if expected not in codes or (not expected and any(codes)):
                log = (root / "log.txt").read_text()[-2000:]
                raise RuntimeError(f"exit codes {codes} where {expected} was due\n{log}")
        start = int((root / "killed.start").read_text())
        if not 0 < start < kill_at:
            raise RuntimeError(f"killed at step {kill_at}, it was started again at step {start}")
        names = [[f"{name}.weights-{r}" for r in range(ranks)] for name in ("straight", "killed")]
        straight, killed = ([(root / one).read_bytes() for one in each] for each in names)
        return straight == killed


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=1, help="DDP processes; the default is 1")
    parser.add_argument("--only", choices=CELLS, help="one row of the table")
    options = parser.parse_args(arguments)
    rows = [options.only] if options.only else list(CELLS)
    began = time.monotonic()
    print("straight, and killed and started again: are the final weights the same to the bit?\n")
    print(" " * WIDTH + "".join(f"{count} workers".ljust(14) for count in WORKERS))
    marks = []
    for cell in rows:
        print(cell.ljust(WIDTH), end="", flush=True)
        for workers in WORKERS:
            marks.append(is_exact(cell, workers, options.ranks))
            print(("exact" if marks[-1] else "DIFFERENT").ljust(14), end="", flush=True)
        print()
    seconds = time.monotonic() - began
    print(f"\n{sum(marks)} of {len(marks)} cells exact ({seconds:.0f} s)")
    return 0 if all(marks) else 1


if __name__ == "__main__":
    sys.exit(main())
