"""The random streams of a run, while those of the program are in their place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dream_trainer.progress import Progress
from dream_trainer.randomness import rng_state, set_rng_state


class RunStreams:
    """Remembers where the global random streams are to be when a run goes on.

    A run has the global streams to itself, and leaves the program's own as they were. What it
    would draw next is laid aside, so that its state, and another ``fit``, go on from there.

    Args:
        progress: of the run. Once it has moved on, by a loop of the user's own, what was laid
            aside is of the past: that loop draws from the global streams as they are.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._aside: tuple[Mapping[str, Any], Mapping[str, Any]] | None = None

    def lay_aside(self) -> None:
        """Remember the global streams as those of the run."""
        self._aside = self._progress.state_dict(), rng_state()

    def state(self) -> Mapping[str, Any]:
        """Of the run's streams, laid aside or in place."""
        if self._aside is not None and self._aside[0] == self._progress.state_dict():
            return self._aside[1]
        return rng_state()

    def take_up(self) -> bool:
        """Put what was laid aside in place, once; whether there was something."""
        had_some, state = self._aside is not None, self.state()
        self._aside = None
        set_rng_state(state)
        return had_some
