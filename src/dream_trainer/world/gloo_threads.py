"""Threads of process groups, which run in C++ and must be gone before Python is."""

from __future__ import annotations

import atexit
import threading
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

_SECONDS_BETWEEN_LOOKS = 0.002
_MOST_SECONDS = 0.5
_NUM_QUIET_LOOKS = 3


@cache
def let_threads_finish_at_exit() -> None:
    """From now on, `let_threads_finish` before the interpreter ends.

    Otherwise the whole process may be aborted there ("terminate called without an active
    exception"), and a run that ended well counts as failed.
    """
    atexit.register(let_threads_finish)


def let_threads_finish() -> None:
    """Return once no C++ thread has anything left to do.

    A thread of gloo lets go of a collective's tensors a moment after the collective is over, and
    needs Python's lock for it. Who ends the group, or Python, with that lock held, waits for ever
    or is aborted.
    """
    num_quiet_looks = 0
    deadline = time.monotonic() + _MOST_SECONDS
    while num_quiet_looks < _NUM_QUIET_LOOKS and time.monotonic() < deadline:
        time.sleep(_SECONDS_BETWEEN_LOOKS)  # without the lock
        num_quiet_looks = 0 if _is_any_running() else num_quiet_looks + 1


def _is_any_running() -> bool:
    """Whether a thread beside this one is running, or about to; False where nobody can tell."""
    own = threading.get_native_id()
    for task in Path("/proc/self/task").glob("[0-9]*"):
        with suppress(OSError):  # gone since
            state = (task / "stat").read_text().rpartition(")")[2].split()[0]
            if state == "R" and int(task.name) != own:
                return True
    return False
