"""Ctrl-C and SIGTERM as requests that all ranks follow after the same batch."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from dream_trainer.world import DreamWorld

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SECONDS_BETWEEN_CHECKS = 1.0


class Interrupted(KeyboardInterrupt):
    """A signal ended the run between two batches: its state is whole and may be saved."""


class Interruption:
    """Lets the batch under way end before a signal ends the run.

    The first signal is noted, the second one acts at once, as without this class. A signal for
    which the program has a handler of its own is left to it, and so is everything outside the
    main thread.

    Args:
        world: the ranks; a signal that one of them gets ends all.
        clock: seconds from any start.
    """

    def __init__(self, world: DreamWorld, clock: Callable[[], float] = time.monotonic) -> None:
        self._world, self._clock = world, clock
        self._is_requested = False
        self._previous: dict[signal.Signals, Any] = {}
        self._num_batches = self._num_batches_until_check = 1
        self._last_check = 0.0

    def __enter__(self) -> Interruption:
        self._is_requested = False
        self._last_check = self._clock()
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                handler = signal.getsignal(number)
                if handler in (signal.SIG_DFL, signal.default_int_handler):
                    self._previous[number] = handler
                    signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def check(self) -> None:
        """After each batch, on every rank.

        On several ranks they ask each other about once a second: costs two small collectives.

        Raises:
            Interrupted: on every rank after the same batch, if one of them got a signal.
        """
        if self._world.size == 1:
            is_requested = self._is_requested
        else:
            self._num_batches_until_check -= 1
            if self._num_batches_until_check:
                return
            is_requested = self._world.any(self._is_requested)
            self._plan_check()
        if is_requested:
            raise Interrupted

    def _plan_check(self) -> None:
        now = self._clock()
        per_second = self._num_batches / max(now - self._last_check, 1e-6)
        # Ranks' clocks differ; asking after different batches they would wait for ever.
        number = self._world.broadcast(max(1, int(per_second * _SECONDS_BETWEEN_CHECKS)))
        self._num_batches = self._num_batches_until_check = number
        self._last_check = now

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._is_requested = True
        self._restore()
        # print is not safe in a signal handler: it may have interrupted another print.
        name = signal.Signals(number).name
        os.write(2, f"\n{name}: stopping after this batch; once more stops at once\n".encode())

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
