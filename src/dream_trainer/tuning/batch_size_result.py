"""What the trials of batch sizes have found."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dream_trainer.tuning.pictures import axes_for, save_picture
from dream_trainer.words import aligned

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from dream_trainer.tuning.trial_run import RankOutcome

#: Of the best throughput: a size that reaches it is as good as any larger one.
_ENOUGH = 0.9
_WORDS = {
    "fits": "fits",
    "out_of_memory": "out of memory",
    "more_than_the_data": "more than the data",
}


@dataclass(frozen=True)
class Trial:
    """One size, tried."""

    size: int
    """Samples in a batch of one rank."""
    outcome: Literal["fits", "out_of_memory", "more_than_the_data"]
    samples_per_second: float | None
    """Over all ranks; None if it does not fit."""
    memory: int | None
    """Bytes at the peak, of the rank with most: reserved on its device, or of its process on a
    CPU."""
    text: str
    """Why it does not fit, in the words of who said so."""

    @classmethod
    def of(cls, size: int, told: RankOutcome) -> Trial:
        """Of what the ranks have told."""
        assert told.outcome != "failed"
        if told.outcome != "fits":
            return cls(size, told.outcome, None, None, told.text)
        return cls(size, "fits", told.samples / told.seconds, told.memory, told.text)

    @property
    def fits(self) -> bool:
        """Whether all ranks trained on batches of that size."""
        return self.outcome == "fits"

    def cells(self) -> tuple[str, str, str, str]:
        """Size, outcome, speed and memory as text."""
        speed = "-" if self.samples_per_second is None else f"{self.samples_per_second:,.0f}"
        memory = "-" if self.memory is None else f"{self.memory / 2**20:,.0f}"
        return f"{self.size:,}", _WORDS[self.outcome], speed, memory

    def __str__(self) -> str:
        size, outcome, speed, memory = self.cells()
        if not self.fits:
            return f"{size}: {outcome}"
        return f"{size}: {outcome}, {speed} samples/s, {memory} MiB"


@dataclass(frozen=True)
class BatchSizeResult:
    """All trials. ``str()`` is a table and the suggestions."""

    field: str
    """Dotted name of the field that was tried."""
    configured: int
    """The size that the search began with."""
    trials: tuple[Trial, ...]
    """In the order in which they were made."""

    @property
    def fitting(self) -> tuple[Trial, ...]:
        """Trials that fit, by size."""
        return tuple(sorted((one for one in self.trials if one.fits), key=lambda one: one.size))

    @property
    def largest(self) -> int:
        """The largest size that fits. Validation, or longer samples, may need more memory."""
        return self.fitting[-1].size

    @property
    def efficient(self) -> int:
        """The smallest size with nine tenths of the best throughput; larger ones bring little."""
        best = max(one.samples_per_second or 0.0 for one in self.fitting)
        return next(
            one.size for one in self.fitting if (one.samples_per_second or 0.0) >= _ENOUGH * best
        )

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draw throughput over size, with memory beside it.

        Args:
            axes: of matplotlib, to draw on; None makes a figure.

        Returns:
            The axes; ``.figure`` has the rest.

        Raises:
            ConfigError: matplotlib is not installed.
        """
        axes = axes_for(axes)
        sizes = [one.size for one in self.fitting]
        speeds = [one.samples_per_second or 0.0 for one in self.fitting]
        (speed,) = axes.plot(sizes, speeds, "o-", color="tab:blue", label="samples per second")
        lines = [speed]
        lines.append(
            axes.axvline(
                self.efficient, color="tab:red", linestyle=":", label=f"efficient {self.efficient}"
            )
        )
        too_large = [one.size for one in self.trials if not one.fits]
        if too_large:
            label = f"does not fit: {min(too_large)}"
            lines.append(axes.axvline(min(too_large), color="tab:gray", label=label))
        beside = axes.twinx()
        memory = [(one.memory or 0) / 2**20 for one in self.fitting]
        lines += beside.plot(sizes, memory, "s--", color="tab:orange", label="peak memory")
        beside.set(ylabel="MiB", ylim=(0, 1.15 * max(memory)))
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.set(xlabel=f"{self.field} of one rank", ylabel="samples per second")
        axes.set_ylim(0, 1.15 * max(speeds))
        axes.grid(alpha=0.3)
        axes.legend(handles=lines, loc="lower right")
        return axes

    def save(self, path: str | Path) -> None:
        """Write the drawing of `plot` into a file; its ending says of which kind.

        Raises:
            ConfigError: matplotlib is not installed.
        """
        save_picture(self.plot(), path)

    def __str__(self) -> str:
        head = ("size", "", "samples/s", "MiB")
        rows = [head, *(one.cells() for one in sorted(self.trials, key=lambda one: one.size))]
        lines = aligned(rows, left=(1,))
        lines.append(f"largest that fits {self.largest}; efficient from {self.efficient}")
        return "\n".join(lines)
