"""How long a save holds up the training, and how long it takes to be on disk.

    python tests/benchmarks/bench_saves.py [--megabytes 800 3000] [--rounds 5] [--folder DIR]

Each round makes one save in every way, in turn, after some steps that meet nothing. The stall is
the time of the call, plus what the step after it takes longer than the median of those before it.
"""

from __future__ import annotations

import argparse
import functools
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from lightning.fabric import Fabric
from rounds import Spread, Target, per_round, report, seconds
from torch import nn

from dream_trainer import Checkpointer, CheckpointParameters

STEPS = 5


class Training:
    """Layers of 1024 x 1024 with AdamW: a state of three times their size."""

    def __init__(self, megabytes: int) -> None:
        layers = max(1, round(megabytes / (3 * 4.2)))
        self.model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(layers)))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5)
        self.batch = torch.randn(4, 1024)
        self.step()
        state = self.optimizer.state_dict()["state"].values()
        everything = [*self.model.state_dict().values(), *(t for s in state for t in s.values())]
        self.tensors = [tensor.detach() for tensor in everything]
        self.buffers = [torch.zeros_like(tensor) for tensor in self.tensors]

    @property
    def megabytes(self) -> float:
        return sum(t.nbytes for t in self.tensors) / 1e6

    def step(self) -> None:
        self.model(self.batch).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def copy(self) -> None:
        """Of the same bytes, into buffers that are there."""
        for buffer, tensor in zip(self.buffers, self.tensors, strict=True):
            buffer.copy_(tensor)


@dataclass
class Way:
    """A way to save.

    Args:
        save: returns when the training may go on.
        wait: returns when everything is committed.
    """

    save: Callable[[], object]
    wait: Callable[[], object] = bool


def ways(training: Training, folder: Path) -> dict[str, Way]:
    """All of them; the first is no save at all."""
    fabric = Fabric(accelerator="cpu", devices=1)
    # Deleting older checkpoints is not what is compared.
    keep = {"keep_last": 1_000}
    behind = Checkpointer(folder / "behind", parameters=CheckpointParameters(**keep))
    within = Checkpointer(
        folder / "within", parameters=CheckpointParameters(async_save=False, **keep)
    )
    steps = iter(range(1, 1_000_000))
    pending: list[Any] = []

    def ours(checkpointer: Checkpointer) -> None:
        optimizers = [training.optimizer]
        checkpointer.save(training.state(), step=next(steps), optimizers=optimizers)

    def torch_async() -> None:
        place = folder / f"torch-async-{next(steps)}"
        pending.append(dcp.async_save(training.state(), checkpoint_id=place))

    return {
        "a copy": Way(training.copy),
        "fabric.save": Way(lambda: fabric.save(folder / f"{next(steps)}.pt", training.state())),
        "dcp.save": Way(
            lambda: dcp.save(training.state(), checkpoint_id=folder / f"torch-{next(steps)}")
        ),
        "dcp.async_save": Way(torch_async, lambda: pending.pop().result()),
        "ours, in the step": Way(functools.partial(ours, within)),
        "ours, behind it": Way(functools.partial(ours, behind), behind.wait),
    }


def measure(megabytes: int, rounds: int, folder: Path) -> dict[str, dict[str, list[float]]]:
    """Seconds of calls, of stalls and until committed, by way; a value a round."""
    training = Training(megabytes)
    print(f"\n{training.megabytes:.0f} MB of model and AdamW state", flush=True)
    all_ways = ways(training, folder)
    taken: dict[str, dict[str, list[float]]] = {
        name: {"call": [], "stall": [], "committed": []} for name in all_ways
    }
    for number in range(-1, rounds):
        for name, way in all_ways.items():
            undisturbed = statistics.median(seconds(training.step) for _ in range(STEPS))
            start = time.perf_counter()
            call = seconds(way.save)
            disturbed = seconds(training.step)
            is_behind = way.wait is not bool
            way.wait()
            committed = time.perf_counter() - start if is_behind else call
            if number >= 0:  # the first round allocates the buffers
                taken[name]["call"].append(call)
                taken[name]["stall"].append(call + disturbed - undisturbed)
                taken[name]["committed"].append(committed)
            for path in folder.iterdir():  # the disk is as full as before
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, nargs="*", default=[800, 3000])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="on the file system that is to be measured")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    values, targets = {}, []
    for megabytes in options.megabytes:
        with tempfile.TemporaryDirectory(prefix="bench-saves-", dir=options.folder) as name:
            taken = measure(megabytes, options.rounds, Path(name))
        print(f"{'':20}{'call, s':>24}{'stall, s':>24}{'committed, s':>24}")
        for way, columns in taken.items():
            print(f"{way:20}" + "".join(f"{Spread.of(one)!s:>24}" for one in columns.values()))
        values[f"{megabytes} MB"] = {
            way: {name: Spread.of(column) for name, column in columns.items()}
            for way, columns in taken.items()
        }
        copy = taken["a copy"]["call"]
        stall = per_round(lambda a, b: a / b, taken["ours, behind it"]["stall"], copy)
        sync, theirs = taken["ours, in the step"]["call"], taken["dcp.save"]["call"]
        targets += [
            Target(f"stall of a save at {megabytes} MB, of one copy", stall, 1.5),
            Target(
                f"save in the step at {megabytes} MB, of dcp.save",
                per_round(lambda a, b: a / b, sync, theirs),
                1.3,
            ),
        ]
    report("saves", values, targets)


if __name__ == "__main__":
    main()
