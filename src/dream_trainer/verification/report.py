"""ResumeReport: what was found, in a few lines."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass


@dataclass(frozen=True)
class Difference:
    """The first value that is not the same in two runs."""

    path: str
    """Where: ``models.net.0.weight``, ``batches.0.x``, ``callbacks.ema.decay``."""
    step: int
    """Optimizer steps taken when it was seen."""
    place: str
    """That moment in words."""
    straight: str
    """The value in the run that nobody interrupted."""
    other: str
    """The value in the other run."""
    in_state: bool = True
    """Whether the path is one of the state, the batches or the log; else it is an attribute."""


@dataclass(frozen=True)
class ResumeReport:
    """The outcome of `verify_resume`. ``str(report)`` says it in a few lines."""

    is_exact: bool
    """Whether nothing differed."""
    steps: int
    """Optimizer steps of the straight run."""
    kills: tuple[int, ...] = ()
    """Steps after which the run was killed and resumed; twice the same if an epoch ended there."""
    num_values: int = 0
    """Paths that were compared at each step."""
    difference: Difference | None = None
    """The first difference; None if there is none."""
    killed_at: str | None = None
    """The moment of the kill after which it appeared; None if two straight runs differ."""
    also: tuple[str, ...] = ()
    """Other paths that differ at the same moment."""
    cause: str | None = None
    """What it likely comes from, and what to do."""
    notes: tuple[str, ...] = ()
    """What was not looked at."""
    traceback: str | None = None
    """Where the resumed run failed, if it did."""

    def __str__(self) -> str:
        lines = [self._exact()] if self.is_exact else self._not_exact()
        lines += [f"note: {note}" for note in self.notes]
        if self.traceback is not None:
            lines += ["", self.traceback.rstrip()]
        return "\n".join(lines)

    def _exact(self) -> str:
        unique = list(dict.fromkeys(self.kills))
        every = unique == list(range(1, self.steps + 1))
        when = "each" if every else f"step {', '.join(map(str, unique))}"
        return (
            f"exact: {self.steps} steps, killed and resumed after {when}; "
            f"{self.num_values} values compared"
        )

    def _not_exact(self) -> list[str]:
        found = self.difference
        assert found is not None
        if self.killed_at is None:
            head = "not exact: two straight runs differ, so no resumed run can be exact"
            other = "again"
        else:
            head = f"not exact: killed after {self.killed_at} and resumed, it is another run"
            other = "resumed"
        kind = "" if found.in_state else " (an attribute)"
        lines = [
            head,
            f"first difference at {found.place}: {found.path}{kind}",
            f"  straight: {found.straight}",
            f"  {other + ':':<9} {found.other}",
        ]
        if self.also:
            more = len(self.also) - 3
            shown = ", ".join(self.also[:3]) + (f" and {more} more" if more > 0 else "")
            lines.append(f"  with it: {shown}")
        return [*lines, *textwrap.wrap(f"likely cause: {self.cause}", 100, break_on_hyphens=False)]
