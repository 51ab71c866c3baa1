"""What it costs that every sample's draws depend on (seed, epoch, index) alone.

python tests/benchmarks/bench_sample_seeding.py [--rounds 9] [--samples 1600]
"""

from __future__ import annotations

import argparse
import collections
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from rounds import Spread, interleaved, per_round, report, seconds
from torch.utils.data import DataLoader, Dataset

from dream_trainer.data import ResumableLoader

BATCH_SIZE = 32


class Rows(Dataset[torch.Tensor]):
    """As little work as a sample can be: the ratio is the worst there is."""

    def __init__(self, length: int) -> None:
        self.rows = torch.zeros(length, 16)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.rows[index]


class Images(Rows):
    """A flip, a crop and noise on 3 x 64 x 64 pixels."""

    def __init__(self, length: int) -> None:
        super().__init__(length)
        self.image = torch.zeros(3, 72, 72)

    def __getitem__(self, index: int) -> torch.Tensor:
        top, left = np.random.randint(8, size=2)
        image = self.image[:, top : top + 64, left : left + 64]
        image = image.flip(-1) if torch.rand(()) < 0.5 else image
        return image + 0.1 * torch.randn(3, 64, 64)


class OwnGenerator(Images):
    """The noise comes from a generator that the data set keeps."""

    def __init__(self, length: int) -> None:
        super().__init__(length)
        self.rng = np.random.default_rng()

    def __getitem__(self, index: int) -> torch.Tensor:
        noise = self.rng.standard_normal((3, 64, 64), dtype=np.float32)
        return self.image[:, :64, :64] + 0.1 * torch.from_numpy(noise)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--samples", type=int, default=1_600)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{BATCH_SIZE} samples a batch, us a sample: median [quartiles]")
    print(f"{'data':<14}{'workers':>8}{'off':>24}{'more':>24}{'ratio':>24}")
    values = {}
    for kind in (Rows, Images, OwnGenerator):
        for workers in (0, 1):
            name = f"{kind.__name__}, {workers} workers"
            values[name] = found = measure(kind, workers, options.samples, options.rounds)
            row = "".join(f"{one!s:>24}" for one in found.values())
            print(f"{kind.__name__:<14}{workers:>8}{row}", flush=True)
    report("sample_seeding", values)


def measure(
    kind: Callable[[int], Dataset[Any]], workers: int, samples: int, rounds: int
) -> dict[str, Spread]:
    """Microseconds of a sample without seeding, what seeding adds, and its share."""
    loaders = {
        seeds: ResumableLoader(
            DataLoader(
                kind(samples), BATCH_SIZE, num_workers=workers, persistent_workers=bool(workers)
            ),
            seed=1,
            seed_samples=seeds,
        )
        for seeds in (False, True)
    }

    def of_a_sample(loader: ResumableLoader) -> float:
        return seconds(lambda: collections.deque(loader, maxlen=0)) / samples * 1e6

    ways = {str(seeds): functools.partial(of_a_sample, one) for seeds, one in loaders.items()}
    times = interleaved(ways, rounds)
    for loader in loaders.values():
        loader.close()
    off, on = times.values()
    return {
        "off": Spread.of(off),
        "more": per_round(lambda a, b: a - b, on, off),
        "ratio": per_round(lambda a, b: a / b, on, off),
    }


if __name__ == "__main__":
    main()
