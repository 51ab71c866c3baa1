"""What a learning-rate range test has found."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dream_trainer.tuning.pictures import axes_for, save_picture
from dream_trainer.tuning.range_test import Mode
from dream_trainer.tuning.smoothing import smoothed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Of the points, at the beginning, that are no suggestion: weights are still those of the start.
_SKIPPED = 0.05
_BARS = " ▁▂▃▄▅▆▇█"
_WIDTH = 60


@dataclass(frozen=True)
class LearningRateResult:
    """Rates, losses and what they suggest. ``str()`` is a few lines for a terminal."""

    lrs: tuple[float, ...]
    """Rates that were tried, one an optimizer step."""
    losses: tuple[float, ...]
    """Loss of each step, before it changed the weights; a mean over its batches and all ranks."""
    configured: float
    """The rate of the configuration."""
    is_diverged: bool
    """Whether the loss ended the test before its last step."""
    mode: Mode
    smoothing: float
    optimizer: str | None = None
    """The one whose rate grew; None for all."""

    @property
    def smoothed(self) -> tuple[float, ...]:
        """The losses without their noise, as far as they are finite."""
        finite = list(itertools.takewhile(math.isfinite, self.losses))
        return tuple(smoothed(finite, self.smoothing))

    @property
    def suggestion(self) -> float | None:
        """The rate at which the smoothed loss falls fastest, from step to step.

        Looked for between the first twentieth of the points and the lowest one. None if the loss
        does not fall there.
        """
        found = self._steepest()
        return None if found is None else self.lrs[found]

    @property
    def factor(self) -> float | None:
        """By which to multiply every rate of the configuration; None without a suggestion."""
        return None if self.suggestion is None else self.suggestion / self.configured

    def _steepest(self) -> int | None:
        values = np.array(self.smoothed)
        first = math.ceil(len(values) * _SKIPPED)
        if len(values) < first + 3:
            return None
        last = first + int(values[first:].argmin())
        if last - first < 2:
            return None
        slopes = np.gradient(values)[first : last + 1]
        steepest = int(slopes.argmin())
        return first + steepest if slopes[steepest] < 0 else None

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draw losses over rates, with the suggestion marked.

        Args:
            axes: of matplotlib, to draw on; None makes a figure.

        Returns:
            The axes; ``.figure`` has the rest.

        Raises:
            ConfigError: matplotlib is not installed.
        """
        axes = axes_for(axes)
        values = self.smoothed
        seen = len(values)
        axes.plot(self.lrs[:seen], self.losses[:seen], color="tab:blue", alpha=0.3, label="loss")
        axes.plot(self.lrs[:seen], values, color="tab:blue", linewidth=2, label="smoothed")
        if (found := self._steepest()) is not None:
            label = f"suggestion {self.lrs[found]:.2g}"
            axes.plot(self.lrs[found], values[found], "o", color="tab:red", label=label)
        if self.lrs[0] <= self.configured <= self.lrs[-1]:
            label = f"configured {self.configured:.2g}"
            axes.axvline(self.configured, color="tab:gray", linestyle=":", label=label)
        if values:
            # A loss that blows up would press the rest of the curve flat.
            low, high = min(self.losses[:seen]), max(self.losses[: seen // 2 + 1])
            margin = 0.1 * (high - low) or 0.1 * abs(high) or 1.0
            axes.set_ylim(low - margin, high + 3 * margin)
        if self.mode == "exponential":
            axes.set_xscale("log")
        axes.set(xlabel="learning rate", ylabel="training loss")
        axes.grid(alpha=0.3)
        axes.legend()
        return axes

    def save(self, path: str | Path) -> None:
        """Write the drawing of `plot` into a file; its ending says of which kind.

        Raises:
            ConfigError: matplotlib is not installed.
        """
        save_picture(self.plot(), path)

    def __str__(self) -> str:
        values = self.smoothed
        end = "the loss diverged" if self.is_diverged else "the end of the range"
        lines = [f"{len(self.lrs)} steps from {self.lrs[0]:.2g} to {self.lrs[-1]:.2g} ({end})"]
        if values:
            lines += [_sparkline(values), f"lowest smoothed loss {min(values):.4g}"]
        if self.suggestion is None:
            return "\n".join(
                [*lines, "no suggestion: the loss does not fall. Try other rates, or more steps."]
            )
        lines.append(
            f"suggestion {self.suggestion:.2g} ({self.factor:.2g} x the configured "
            f"{self.configured:.2g})"
        )
        return "\n".join(lines)


def _sparkline(values: tuple[float, ...]) -> str:
    """A loss as a line of bars; what lies above its start is as high as a bar can be."""
    columns = np.array_split(np.array(values), min(_WIDTH, len(values)))
    low, high = min(values), max(values[: max(1, len(values) // 2)])
    scale = (high - low) or 1.0
    heights = [min(max((float(c.mean()) - low) / scale, 0.0), 1.0) for c in columns]
    return "".join(_BARS[1 + round(height * (len(_BARS) - 2))] for height in heights)
