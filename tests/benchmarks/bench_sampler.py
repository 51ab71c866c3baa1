"""Beginning an epoch of a shuffled data set of any length, and in the middle of it.

    python tests/benchmarks/bench_sampler.py [--rounds 5]

Each measurement is a process of its own: time to the first batch, and the memory that it took.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

from rounds import Spread, Target, interleaved, report
from torch.utils.data import DataLoader, Dataset

LENGTHS = [10_000, 1_000_000, 1_000_000_000]


class Numbers(Dataset[int]):
    """A data set that takes no memory."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        return index


def megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure_here(length: int, position: float) -> None:
    """Print seconds to the first batch from a position on, and megabytes."""
    from dream_trainer.data import ResumableLoader

    loader = ResumableLoader(DataLoader(Numbers(length), batch_size=8, shuffle=True), seed=1)
    state = loader.state_dict()
    loader.load_state_dict(state | {"position": int(length * position) // 8 * 8})
    before, start = megabytes(), time.perf_counter()
    batches = iter(loader)
    next(batches)
    print(json.dumps([time.perf_counter() - start, megabytes() - before]))
    batches.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--here", nargs=2, type=float)
    options = parser.parse_args()
    if options.here:
        measure_here(int(options.here[0]), options.here[1])
        return
    memory: dict[str, list[float]] = {}

    def measure(name: str, length: int, position: float) -> float:
        words = [sys.executable, __file__, "--here", str(length), str(position)]
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
        took, more = json.loads(done.stdout)
        memory.setdefault(name, []).append(more)
        return float(took)

    places = {
        f"{length:.0e} samples, {where}": (length, position)
        for length in LENGTHS
        for where, position in (("first batch", 0.0), ("from the middle", 0.5))
    }
    ways = {name: (lambda n=name, p=place: measure(n, *p)) for name, place in places.items()}
    times = {n: Spread.of(t) for n, t in interleaved(ways, options.rounds, warm_up=0).items()}
    sizes = {name: Spread.of(values) for name, values in memory.items()}
    print(f"{'':32}{'seconds':>24}{'MB':>24}")
    for name in places:
        print(f"{name:32}{times[name]!s:>24}{sizes[name]!s:>24}")
    largest = f"{LENGTHS[-1]:.0e} samples, first batch"
    targets = [
        Target("epoch start at 1e9 samples, s", times[largest], 1.0),
        Target("memory at 1e9 samples, MB", sizes[largest], 100.0),
    ]
    report("sampler", {"seconds": times, "megabytes": sizes}, targets)


if __name__ == "__main__":
    main()
