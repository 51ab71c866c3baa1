"""Seconds by phase of a step: counted, spread over steps, shown as a table."""

from __future__ import annotations

import functools
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dream_trainer.words import aligned

#: What a step can be doing, in the order of a step.
PHASES = (
    "loader",
    "to device",
    "training_step",
    "backward",
    "optimizer step",
    "callbacks",
    "validation",
    "save",
    "other",
)
_MEANINGS = {
    "loader": "loader (waiting for a batch)",
    "training_step": "training_step (forward, loss)",
}
#: Bins of a spread are this much wider than the one before: p95 is right to a hundredth.
_RATIO = math.log(1.02)


class PhaseClock:
    """Counts seconds by phase, from one change of phase to the next.

    Args:
        synchronize: called before the clock is read at each change.
        clock: seconds from any start.
    """

    def __init__(
        self,
        synchronize: Callable[[], object] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._synchronize, self._clock = synchronize, clock
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self.phase, self._since = "other", clock()

    def enter(self, phase: str) -> None:
        """Another phase begins; one that is not in `PHASES` is ``other``."""
        if self._synchronize is not None:
            self._synchronize()
        now = self._clock()
        self._seconds[self.phase] += now - self._since
        self._since = now
        self.phase = phase if phase in self._seconds else "other"

    def take(self) -> dict[str, float]:
        """The seconds of each phase since this was last called."""
        self.enter(self.phase)
        taken, self._seconds = self._seconds, dict.fromkeys(PHASES, 0.0)
        return taken

    def around(self, phase: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """A function whose calls are counted as a phase of their own."""

        @functools.wraps(call)
        def counted(*args: Any) -> Any:
            before = self.phase
            self.enter(phase)
            try:
                return call(*args)
            finally:
                self.enter(before)

        return counted


@dataclass
class Spread:
    """How long something took, many times, in memory that does not grow with their number."""

    total: float = 0.0
    count: int = 0
    bins: Counter[int] = field(default_factory=Counter)

    def add(self, seconds: float) -> None:
        """Once more; nothing if it took no time."""
        if seconds > 0:
            self.total += seconds
            self.count += 1
            self.bins[math.floor(math.log(seconds) / _RATIO)] += 1

    def quantile(self, share: float) -> float:
        """Seconds that a share of the times stayed below, right to a hundredth."""
        left = share * self.count
        for number in sorted(self.bins):
            left -= self.bins[number]
            if left <= 0:
                return math.exp((number + 0.5) * _RATIO)
        return 0.0


@dataclass(frozen=True)
class PhaseTime:
    """A phase over all steps."""

    phase: str
    """One of `PHASES`, or ``step`` for all of them."""
    mean: float
    """Seconds a step, over all steps."""
    p95: float
    """Seconds that 19 of 20 steps stayed below, of those that had the phase."""
    steps: int
    """Steps that had the phase."""
    slowest: tuple[int, float] | None = None
    """The rank with the highest mean, and that; None where the ranks were not asked."""


class StepSpreads:
    """The times of many steps, by phase."""

    def __init__(self) -> None:
        self._spreads = {phase: Spread() for phase in (*PHASES, "step")}

    def add(self, seconds: Mapping[str, float]) -> None:
        """A step."""
        for phase, one in seconds.items():
            self._spreads[phase].add(one)
        self._spreads["step"].add(sum(seconds.values()))

    @property
    def num_steps(self) -> int:
        """Steps that were added."""
        return self._spreads["step"].count

    def means(self) -> dict[str, float]:
        """Seconds a step by phase, over all steps."""
        steps = max(self.num_steps, 1)
        return {phase: one.total / steps for phase, one in self._spreads.items()}

    def summary(self, of_ranks: Sequence[Mapping[str, float]] = ()) -> list[PhaseTime]:
        """All phases that there were, and the step.

        Args:
            of_ranks: `means` of every rank, where they were asked.
        """
        means, found = self.means(), []
        for phase, spread in self._spreads.items():
            if spread.count:
                others = [(one[phase], -rank) for rank, one in enumerate(of_ranks)]
                slowest = max(others, default=None)
                rank = None if slowest is None else (-slowest[1], slowest[0])
                p95 = spread.quantile(0.95)
                found.append(PhaseTime(phase, means[phase], p95, spread.count, rank))
        return found


def as_table(summary: Sequence[PhaseTime], title: str) -> str:
    """Phases as aligned text, in milliseconds."""
    if not summary:
        return f"{title}: no step was timed"
    has_ranks = any(one.slowest is not None for one in summary)
    heads = ["", "share", "mean ms", "p95 ms", "in steps", "slowest rank"]
    whole = summary[-1]
    rows = [heads]
    for one in summary:
        slowest = "" if one.slowest is None else f"{one.slowest[1] * 1e3:.3f} ({one.slowest[0]})"
        rows.append(
            [
                _MEANINGS.get(one.phase, one.phase),
                f"{one.mean / whole.mean:.1%}",
                f"{one.mean * 1e3:.3f}",
                f"{one.p95 * 1e3:.3f}",
                str(one.steps),
                slowest,
            ]
        )
    if not has_ranks:
        rows = [row[:-1] for row in rows]
    return "\n".join([title, *aligned(rows)])
