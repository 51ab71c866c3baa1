"""Signals as requests, noticed even while the main thread is in a long call."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

_SECONDS_TO_UNWIND = 3.0
# One Ctrl-C reaches a launched rank twice, from the terminal and from its launcher.
_SECONDS_OF_ONE_CTRL_C = 0.5
_DEADLINE, _LEAVE = 0, 255  # no signals have these numbers

_active: SignalWatch | None = None


def _forget_in_child() -> None:
    """A forked child must not answer for its parent, nor survive being terminated."""
    if _active is not None:
        _active.restore()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)


class SignalWatch:
    """While active, signals are handed to a function, by a thread of their own.

    Python runs signal handlers in the main thread, and only once it is back from what it does: a
    long step, a collective that waits for ever. The thread hears of a signal at once.

    A second Ctrl-C acts at once. Signals that the program has a handler for are left to it, and
    so is everything if this is not the main thread.

    Args:
        numbers: signals to hand over, besides Ctrl-C.
        heard: called with a signal, in the thread; its first one only.
        expired: called with an exit status, in the thread, when the time to end is over.
        clock: seconds from any start.
    """

    def __init__(
        self,
        numbers: Iterable[signal.Signals],
        heard: Callable[[signal.Signals], None],
        expired: Callable[[int], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._numbers = [signal.SIGINT, *numbers]
        self._heard, self._expired, self._clock = heard, expired, clock
        self._previous: dict[signal.Signals, Any] = {}
        self._thread: threading.Thread | None = None
        self._deadline: tuple[float, int] | None = None
        # Each thread hears of a signal at its own time.
        self._first_ctrl_c: dict[int, float] = {}
        self._caught: set[int] = set()
        self._heard_of: set[int] = set()
        self.has_caught = False
        """Whether there may be something to `settle`."""

    def __enter__(self) -> SignalWatch:
        global _active
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._deadline = None
        self._first_ctrl_c.clear()
        self._caught, self._heard_of, self.has_caught = set(), set(), False
        self._thread = threading.Thread(target=self._run, name="signals", daemon=True)
        self._thread.start()
        if threading.current_thread() is threading.main_thread() and _active is None:
            _active = self
            self._previous_descriptor = signal.set_wakeup_fd(
                self._writer, warn_on_full_buffer=False
            )
            for number in self._numbers:
                handler = signal.getsignal(number)
                if handler in (signal.SIG_DFL, signal.default_int_handler):
                    self._previous[number] = handler
                    signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()
        os.write(self._writer, bytes([_LEAVE]))
        assert self._thread is not None
        self._thread.join()
        os.close(self._reader)
        os.close(self._writer)

    def restore(self) -> None:
        """Put back the handlers that were there before."""
        global _active
        if _active is self:
            _active = None
            signal.set_wakeup_fd(self._previous_descriptor)
            for number, handler in self._previous.items():
                signal.signal(number, handler)
            self._previous.clear()

    def end_in(self, seconds: float, status: int) -> None:
        """Call ``expired`` after so many seconds, unless this is left before. Any thread."""
        deadline = (self._clock() + seconds, status)
        self._deadline = min(self._deadline or deadline, deadline)
        os.write(self._writer, bytes([_DEADLINE]))

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """In the main thread, late perhaps; the other thread has heard of it already."""
        self._caught.add(number)
        self.has_caught = True
        if number == signal.SIGINT and self._is_second_ctrl_c():
            raise KeyboardInterrupt

    def settle(self) -> None:
        """Return once ``heard`` was called for every signal that the main thread knows of."""
        while self._caught - self._heard_of:
            time.sleep(0.001)

    def _is_second_ctrl_c(self) -> bool:
        now, thread = self._clock(), threading.get_ident()
        if thread not in self._first_ctrl_c:
            self._first_ctrl_c[thread] = now
            return False
        is_launched = "LOCAL_RANK" in os.environ
        return now - self._first_ctrl_c[thread] >= (_SECONDS_OF_ONE_CTRL_C if is_launched else 0)

    def _run(self) -> None:
        while True:
            seconds = None if self._deadline is None else self._deadline[0] - self._clock()
            ready, _, _ = select.select([self._reader], [], [], seconds and max(0, seconds))
            if not ready and self._deadline is not None:
                self._expired(self._deadline[1])
                return
            for number in os.read(self._reader, 64):
                if number == _LEAVE:
                    return
                if number not in self._previous:
                    continue
                is_second = number == signal.SIGINT and self._is_second_ctrl_c()
                if number not in self._heard_of:
                    self._heard(signal.Signals(number))
                elif is_second:
                    # The main thread may be in a call that does not come back.
                    self.end_in(_SECONDS_TO_UNWIND, 128 + signal.SIGINT)
                self._heard_of.add(number)
