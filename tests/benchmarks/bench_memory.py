"""Most memory that a process ever had: training, saving and loading, against a plain loop.

    python tests/benchmarks/bench_memory.py [--megabytes 600] [--rounds 3]

Each measurement is a process of its own. Given is what it had above a plain loop of the same steps,
in units of the state's bytes.
"""

from __future__ import annotations

import argparse
import functools
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rounds import Spread, Target, interleaved, per_round, report
from torch import Tensor, nn

from dream_trainer import (
    CheckpointParameters,
    DeviceParameters,
    DreamTrainer,
    DreamTrainerConfig,
    TrainingParameters,
)

STEPS = 6


def layers(megabytes: int) -> nn.Sequential:
    """With AdamW's state three times their size: so many megabytes in all."""
    return nn.Sequential(
        *(nn.Linear(1024, 1024) for _ in range(max(1, round(megabytes / (3 * 4.2)))))
    )


def plain(megabytes: int, folder: Path, saves: bool = False) -> None:
    """The loop by hand, perhaps with ``torch.save``."""
    from dream_trainer.world import DreamWorld  # what the others have loaded, too

    DreamWorld(DeviceParameters(accelerator="cpu", devices=1))
    model = layers(megabytes)
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(STEPS):
        model(torch.ones(8, 1024)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if saves:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state, folder / "plain.pt")


class Trainer(DreamTrainer):
    megabytes = 0

    def configure_models(self) -> None:
        self.model = layers(self.megabytes)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters())

    def configure_dataloaders(self) -> Any:
        return [torch.ones(8, 1024)] * 10_000, None

    def compute_loss(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.model(batch).square().mean()  # type: ignore[no-any-return]


def ours(
    megabytes: int, folder: Path, steps: int = STEPS, name: str | None = None, **saves: Any
) -> None:
    """The trainer."""
    trainer = Trainer(
        DreamTrainerConfig(
            seed=1,
            experiment=name,
            root_dir=str(folder),
            device_parameters=DeviceParameters(accelerator="cpu", devices=1),
            training_parameters=TrainingParameters(max_steps=steps),
            checkpoint_parameters=CheckpointParameters(every_n_epochs=None, **saves),
        )
    )
    trainer.megabytes = megabytes
    trainer.fit()


WAYS: dict[str, Callable[[int, Path], None]] = {
    "plain loop": plain,
    "plain loop, torch.save": functools.partial(plain, saves=True),
    "ours, no saves": functools.partial(ours, enable=False),
    "ours, saves in the step": functools.partial(ours, every_n_steps=2, async_save=False),
    "ours, saves behind it": functools.partial(ours, every_n_steps=2),
    "ours, resumed": functools.partial(ours, steps=2 * STEPS, name="resumed", async_save=False),
}


def megabytes_of(way: str, megabytes: int, folder: Path) -> float:
    words = [sys.executable, __file__, "--megabytes", str(megabytes), "--here", way, str(folder)]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--here", nargs=2)
    options = parser.parse_args()
    if options.here:
        way, place = options.here
        WAYS[way](options.megabytes, Path(place))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return

    def measure(way: str) -> float:
        with tempfile.TemporaryDirectory(prefix="bench-memory-") as name:
            folder = Path(name)
            if way == "ours, resumed":
                prepare = f"import bench_memory as b, pathlib; b.ours({options.megabytes}, "
                prepare += f"pathlib.Path({name!r}), name='resumed', async_save=False)"
                here = Path(__file__).parent
                command = [sys.executable, "-c", prepare]
                subprocess.run(command, cwd=here, stdout=subprocess.DEVNULL, check=True)
            return megabytes_of(way, options.megabytes, folder)

    taken = interleaved(
        {way: functools.partial(measure, way) for way in WAYS}, options.rounds, warm_up=0
    )
    size = 3 * sum(p.numel() * 4 for p in layers(options.megabytes).parameters()) / 2**20
    print(f"{size:.0f} MiB of model and AdamW state")
    print(f"{'':28}{'MiB at most':>24}{'above plain, states':>24}")
    values = {}
    for way, sizes in taken.items():
        above = per_round(lambda a, b: (a - b) / size, sizes, taken["plain loop"])
        values[way] = {"mebibytes": Spread.of(sizes), "states_above_plain": above}
        print(f"{way:28}{values[way]['mebibytes']!s:>24}{above!s:>24}")
    more = values["ours, saves behind it"]["states_above_plain"]
    report("memory", values, [Target("memory above the plain loop, in states", more, 1.1)])


if __name__ == "__main__":
    main()
