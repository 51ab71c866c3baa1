"""Interleaved rounds, what they say, and where it is kept."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

#: Written by `nox -s bench`, read by `publish.py` and kept with the documentation.
RESULTS = Path(__file__).resolve().parents[2] / "docs" / "performance"


@dataclass(frozen=True)
class Spread:
    """What several rounds gave.

    Args:
        median: of the rounds.
        low: their lower quartile.
        high: their upper quartile.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of one value a round."""
        low, median, high = (
            statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
        )
        return cls(median, low, high)

    def __str__(self) -> str:
        return f"{self.median:.3g} [{self.low:.3g}, {self.high:.3g}]"


@dataclass(frozen=True)
class Target:
    """A promise about a number.

    Args:
        name: what is measured.
        found: what it was.
        limit: what it may be.
        at_least: whether ``limit`` is the smallest number that is good; else it is the largest.
    """

    name: str
    found: Spread
    limit: float
    at_least: bool = False

    @property
    def is_met(self) -> bool:
        """By the median."""
        found = self.found.median
        return found >= self.limit if self.at_least else found <= self.limit

    def __str__(self) -> str:
        sign, verdict = ">=" if self.at_least else "<=", "met" if self.is_met else "MISSED"
        return f"{verdict:7}{self.name}: {self.found}, target {sign} {self.limit:g}"


def interleaved(
    ways: Mapping[str, Callable[[], float]], rounds: int, warm_up: int = 1
) -> dict[str, list[float]]:
    """Call every way once a round, in turn, so that all of them meet the same noise.

    Args:
        ways: name -> a function that measures once.
        rounds: how many are kept.
        warm_up: rounds before them that are not.

    Returns:
        Name -> a value for each round.
    """
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(-warm_up, rounds):
        for name, measure in ways.items():
            value = measure()
            if number >= 0:
                taken[name].append(value)
    return taken


def seconds(function: Callable[[], object]) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def per_round(function: Callable[..., float], *columns: Sequence[float]) -> Spread:
    """A ratio, or any other function, of values of the same round."""
    return Spread.of([function(*values) for values in zip(*columns, strict=True)])


def report(name: str, values: Mapping[str, Any], targets: Sequence[Target] = ()) -> None:
    """Print what is promised, and keep everything in ``docs/performance/NAME.json``."""
    for target in targets:
        print(target, flush=True)
    content = {
        "machine": machine(),
        "values": values,
        "targets": [{**asdict(one), "is_met": one.is_met} for one in targets],
    }
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps(content, indent=2, default=asdict) + "\n"
    (RESULTS / f"{name}.json").write_text(text, encoding="utf-8")


def machine() -> dict[str, Any]:
    """Where this runs."""
    import torch

    model = next(
        (
            line.partition(":")[2].strip()
            for line in _lines("/proc/cpuinfo")
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
