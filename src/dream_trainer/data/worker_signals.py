"""Signals in the worker processes of a loader."""

from __future__ import annotations

import signal
from types import FrameType

_SECONDS = 30


def leave_signals_to_the_trainer() -> None:
    """Let the trainer, which gets them too, finish its batch; it ends its workers itself.

    A scheduler's SIGTERM and a terminal's Ctrl-C go to all processes of a job. A worker that died
    of it would end the run with an error in the middle of a step.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _die_later)
    for name in ("SIGUSR1", "SIGUSR2"):  # how SLURM and others announce the end
        if (number := getattr(signal, name, None)) is not None:
            signal.signal(number, signal.SIG_IGN)


def _die_later(number: int, frame: FrameType | None) -> None:
    # Not never: torch ends workers that hang with the same signal.
    signal.alarm(_SECONDS)
