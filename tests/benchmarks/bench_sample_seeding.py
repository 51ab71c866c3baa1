"""What it costs that every sample's draws depend on (seed, epoch, index) alone.

Reads epochs with ``seed_samples`` on and off in turn, so that both meet the same noise of the
machine, and prints the median over rounds. Run it with ``nox -s bench``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
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
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--samples", type=int, default=1_600)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{BATCH_SIZE} samples a batch; median of {options.rounds} rounds, us a sample")
    print(f"{'data':<14}{'workers':>8}{'off':>10}{'on':>10}{'more':>8}{'ratio':>8}")
    for kind in (Rows, Images, OwnGenerator):
        for workers in (0, 1):
            off, on, ratio = measure(kind, workers, options.samples, options.rounds)
            row = f"{kind.__name__:<14}{workers:>8}{off:>10.1f}{on:>10.1f}{on - off:>8.1f}"
            print(f"{row}{ratio:>8.2f}")


def measure(
    kind: Callable[[int], Dataset[Any]], workers: int, samples: int, rounds: int
) -> tuple[float, float, float]:
    """Medians without and with seeding, and the median of the rounds' ratios."""
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
    times: dict[bool, list[float]] = {False: [], True: []}
    for number in range(rounds + 1):  # the first warms up
        for seeds in (False, True) if number % 2 else (True, False):
            start = time.perf_counter()
            for _ in loaders[seeds]:
                pass
            if number:
                times[seeds].append((time.perf_counter() - start) / samples * 1e6)
    for loader in loaders.values():
        loader.close()
    ratios = [on / off for off, on in zip(times[False], times[True], strict=True)]
    return (
        statistics.median(times[False]),
        statistics.median(times[True]),
        statistics.median(ratios),
    )


if __name__ == "__main__":
    main()
