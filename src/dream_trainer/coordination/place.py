"""Where a rank is: written in nanoseconds, readable by others after it was killed."""

from __future__ import annotations

import mmap
import os
import struct
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

#: What a rank can be doing, as it is called in messages.
PHASES = (
    "start",
    "configure",
    "setup",
    "restore",
    "loader",
    "training_step",
    "backward",
    "optimizer step",
    "validation",
    "save",
    "end",
)
_TRAINING_STEP = PHASES.index("training_step")
_NUMBERS = {phase: number for number, phase in enumerate(PHASES)}
_LAYOUT = struct.Struct("=qqqq")


class Place:
    """The phase, step, epoch and batch that a rank is in.

    Lies in memory until `share` moves it to a file that other processes of the machine map:
    what a killed process wrote there is still there.
    """

    def __init__(self) -> None:
        self._file: mmap.mmap | None = None
        self._numbers = memoryview(bytearray(_LAYOUT.size)).cast("q")

    def enter(self, phase: str) -> None:
        """Say what comes now: one of `PHASES`."""
        self._numbers[0] = _NUMBERS[phase]

    @property
    def phase(self) -> str:
        """What was entered last."""
        return PHASES[self._numbers[0]]

    def enter_step(self, step: int, epoch: int, batch: int) -> None:
        """Say that a batch goes into ``training_step``, and how far the run is."""
        numbers = self._numbers
        numbers[0], numbers[1], numbers[2], numbers[3] = _TRAINING_STEP, step, epoch, batch

    def observe(self, tell: Callable[[str], object] | None) -> None:
        """Call a function with each phase that is entered, before it is noted.

        Args:
            tell: the function; None for no more. Without one nobody pays for this.
        """
        own = vars(self)
        own.pop("enter", None)
        own.pop("enter_step", None)
        if tell is None:
            return

        def enter(phase: str) -> None:
            tell(phase)
            type(self).enter(self, phase)

        def enter_step(step: int, epoch: int, batch: int) -> None:
            tell("training_step")
            type(self).enter_step(self, step, epoch, batch)

        own.update(enter=enter, enter_step=enter_step)

    def share(self) -> Path:
        """Move to a file; `forget` it once all who want to see it have opened it.

        Raises:
            OSError: there is no room for one; the place stays in memory.
        """
        descriptor, name = tempfile.mkstemp(prefix="dream-trainer-place-")
        try:
            os.write(descriptor, self._numbers.tobytes())
            self._file = mmap.mmap(descriptor, _LAYOUT.size)
            self._numbers = memoryview(self._file).cast("q")
        except OSError:
            forget(Path(name))
            raise
        finally:
            os.close(descriptor)
        return Path(name)

    def keep(self) -> None:
        """Back into memory of its own."""
        if self._file is not None:
            shared, file = self._numbers, self._file
            self._numbers = memoryview(bytearray(shared.tobytes())).cast("q")
            self._file = None
            shared.release()
            with suppress(BufferError):  # another thread reads it just now
                file.close()

    def __str__(self) -> str:
        return describe(self._numbers.tobytes())


class SharedPlace:
    """The place of another process of this machine."""

    def __init__(self, path: str) -> None:
        with open(path, "rb") as file:  # noqa: PTH123 - closed at once; the mapping stays
            self._memory = mmap.mmap(file.fileno(), _LAYOUT.size, access=mmap.ACCESS_READ)

    def __str__(self) -> str:
        return describe(self._memory[:])

    def close(self) -> None:
        """Let go of the file."""
        self._memory.close()


def forget(path: Path) -> None:
    """Remove the file's name; the mappings live on, and nothing stays after a kill."""
    with suppress(OSError):
        path.unlink()


def describe(memory: bytes) -> str:
    """A place in words."""
    phase, step, epoch, batch = _LAYOUT.unpack(memory)
    return f"{PHASES[phase]}, step {step}, epoch {epoch}, batch {batch}"
