"""One process at a time trains in a run directory."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

from dream_trainer.errors import ConfigError


class RunLock:
    """Held while a run writes its directory; a process that is killed leaves it behind unlocked.

    Two runs in one directory would cut each other's log and delete each other's checkpoints.

    Args:
        directory: of the run.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / ".lock"
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Take the lock; harmless if it is held already, or where there is no such thing.

        Raises:
            ConfigError: another process has it.
            OSError: the directory cannot be written.
        """
        if self._descriptor is not None or fcntl is None:
            return
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            # A lock of the process, not of the open file: workers that outlive a killed process
            # for a moment must not hold it.
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(descriptor, 200).decode(errors="replace").strip()
            os.close(descriptor)
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return  # a file system without locks
            raise ConfigError(
                "experiment",
                [f"another process ({holder or 'unknown'}) is training in {self._path.parent}"],
                "Wait for it, stop it, or choose another experiment.",
            ) from None
        with contextlib.suppress(OSError):  # on a full disk the lock holds without its label
            os.truncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {os.uname().nodename}\n".encode())
        self._descriptor = descriptor

    def release(self) -> None:
        """Let others in."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
