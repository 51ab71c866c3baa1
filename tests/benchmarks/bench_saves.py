"""How long a save holds up the training, written in the step or behind it.

    python tests/benchmarks/bench_saves.py [--megabytes 800] [--rounds 5]

Each round makes one save in every way, in turn; between two saves the model trains a few steps.
The stall is the time of the call plus what the next steps take longer than without a save.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from dream_trainer import Checkpointer, CheckpointParameters

STEPS_AFTER = 3


class Training:
    """Layers of 1024 x 1024 with AdamW: a state of three times their size."""

    def __init__(self, megabytes: int) -> None:
        layers = max(1, round(megabytes / (3 * 4.2)))
        self.model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(layers)))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5)
        self.batch = torch.randn(64, 1024)

    def step(self) -> None:
        self.model(self.batch).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self) -> dict[str, object]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=800)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.manual_seed(1)
    training = Training(options.megabytes)
    folder = Path(tempfile.mkdtemp(prefix="bench-saves-"))
    behind = Checkpointer(folder / "behind", parameters=CheckpointParameters(keep_last=1))
    within = Checkpointer(
        folder / "within", parameters=CheckpointParameters(keep_last=1, async_save=False)
    )
    number = 0

    def ours(checkpointer: Checkpointer) -> Callable[[], object]:
        return lambda: checkpointer.save(
            training.state(), step=number, optimizers=[training.optimizer]
        )

    def torch_async() -> None:
        pending.append(dcp.async_save(training.state(), checkpoint_id=folder / "torch"))

    def torch_file() -> None:
        torch.save(training.state(), folder / "state.pt")

    pending: list[object] = []
    ways: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "torch.save": (torch_file, bool),
        "dcp.async_save": (torch_async, lambda: pending.pop().result()),  # type: ignore[attr-defined]
        "in the step": (ours(within), bool),
        "behind the training": (ours(behind), behind.wait),
    }
    stalls: dict[str, list[float]] = {name: [] for name in ways}
    calls: dict[str, list[float]] = {name: [] for name in ways}

    def steps() -> None:
        for _ in range(STEPS_AFTER):
            training.step()

    try:
        steps()
        for number in range(options.rounds + 1):
            for name, (save, finish) in ways.items():
                undisturbed = seconds(steps)
                call = seconds(save)
                disturbed = seconds(steps)
                finish()
                if number:  # the first round allocates the buffers
                    calls[name].append(call)
                    stalls[name].append(call + disturbed - undisturbed)
            print(f"round {number} of {options.rounds}", flush=True)
    finally:
        shutil.rmtree(folder)
    size = sum(t.numel() * t.element_size() for t in training.model.parameters()) * 3 / 1e6
    best = statistics.median(stalls["behind the training"])
    print(f"\n{size:.0f} MB of model and AdamW state, medians of {options.rounds} rounds")
    print(f"{'':24}{'call':>8}{'stall':>8}{'ratio':>8}")
    for name in ways:
        call, stall = statistics.median(calls[name]), statistics.median(stalls[name])
        print(f"{name:24}{call:7.3f}s{stall:7.3f}s{stall / best:8.1f}")


if __name__ == "__main__":
    main()
