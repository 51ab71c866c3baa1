"""From the start of a process to the end of its first step, and back in a run after a kill.

    python tests/benchmarks/bench_first_step.py [--rounds 9]

The hand-written Fabric script saves and resumes nothing. The data set has a billion samples,
so that a run can have read ten million batches of it.
"""

from __future__ import annotations

import argparse
import functools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rounds import Spread, Target, interleaved, per_round, report

COMMON = """
import sys

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset


class Numbers(Dataset):
    def __len__(self):
        return 1_000_000_000

    def __getitem__(self, index):
        return torch.full((4,), index / 1e9), torch.ones(1)


def step_is_done():
    print("step", flush=True)
"""
FABRIC = (
    COMMON
    + """
from lightning.fabric import Fabric

fabric = Fabric(accelerator="cpu", devices=1)
fabric.launch()
model = nn.Linear(4, 1)
model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters()))
# Shuffling a billion would take Fabric's script minutes, and 8 GB.
for x, y in fabric.setup_dataloaders(DataLoader(Numbers(), batch_size=8)):
    fabric.backward((model(x) - y).square().mean())
    optimizer.step()
    optimizer.zero_grad()
    step_is_done()
    break
"""
)
OURS = (
    COMMON
    + """
from dream_trainer import Callback, DreamTrainer, DreamTrainerConfig
from dream_trainer import CheckpointParameters, DeviceParameters, TrainingParameters


class Tells(Callback):
    def post_train_step(self, trainer, result, batch, batch_idx):
        step_is_done()


class Trainer(DreamTrainer):
    def configure_models(self):
        self.model = nn.Linear(4, 1)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.model.parameters())

    def configure_dataloaders(self):
        return DataLoader(Numbers(), batch_size=8, shuffle=True), None

    def compute_loss(self, batch, batch_idx):
        x, y = batch
        return (self.model(x) - y).square().mean()


def trainer(max_steps, callbacks=None):
    return Trainer(
        DreamTrainerConfig(
            seed=1,
            experiment=sys.argv[1],
            device_parameters=DeviceParameters(accelerator="cpu", devices=1),
            training_parameters=TrainingParameters(max_steps=max_steps),
            checkpoint_parameters=CheckpointParameters(async_save=False),
            callbacks=callbacks or {},
        )
    )


if __name__ == "__main__":
    at = int(sys.argv[2])
    if len(sys.argv) == 3:
        trainer(at + 1, {"tells": Tells()}).fit()
    else:  # make a run that stands behind so many batches
        made = trainer(10)
        made.fit()
        progress, loader = made.progress, made.loop.train_loader
        progress.num_steps = progress.num_batches = at
        progress.num_steps_in_epoch = progress.num_batches_in_epoch = at
        loader.load_state_dict(loader.state_dict() | {"position": 8 * at})
        made.save_checkpoint(made.run_directory / "checkpoints" / f"step-{at:08d}")
"""
)


def seconds_to_first_step(folder: Path, *words: str) -> float:
    start = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, *words],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line == "step\n":
                took = time.perf_counter() - start
                process.kill()  # as long as nothing is saved, every round begins alike
                return took
    raise RuntimeError(f"{words} took no step")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-first-step-") as name:
        folder = Path(name)
        (folder / "by_hand.py").write_text(FABRIC, encoding="utf-8")
        (folder / "ours.py").write_text(OURS, encoding="utf-8")
        for at in ("10", "10000000"):
            words = [sys.executable, "ours.py", f"at-{at}", at, "make"]
            subprocess.run(words, cwd=folder, stdout=subprocess.DEVNULL, check=True)
        measure = functools.partial(seconds_to_first_step, folder)
        times = interleaved(
            {
                "import torch": lambda: measure("-c", "import torch; print('step')"),
                "Fabric by hand": lambda: measure("by_hand.py"),
                "ours, fresh": lambda: measure("ours.py", "fresh", "0"),
                "ours, resumed at batch 10": lambda: measure("ours.py", "at-10", "10"),
                "ours, resumed at batch 10,000,000": lambda: measure(
                    "ours.py", "at-10000000", "10000000"
                ),
            },
            options.rounds,
        )
    print(f"{'':36}{'seconds':>24}{'of Fabric by hand':>24}")
    values = {}
    for way, taken in times.items():
        ratio = per_round(lambda a, b: a / b, taken, times["Fabric by hand"])
        values[way] = {"seconds": Spread.of(taken), "of_fabric": ratio}
        print(f"{way:36}{values[way]['seconds']!s:>24}{ratio!s:>24}")
    far, near = times["ours, resumed at batch 10,000,000"], times["ours, resumed at batch 10"]
    targets = [
        Target("first step, of the Fabric script's", values["ours, fresh"]["of_fabric"], 1.1),
        Target(
            "resumed at batch 10,000,000, of batch 10",
            per_round(lambda a, b: a / b, far, near),
            1.2,
        ),
    ]
    report("first_step", values, targets)


if __name__ == "__main__":
    main()
