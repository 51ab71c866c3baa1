"""Where a rank is: written in nanoseconds, readable by others after it was killed."""

from __future__ import annotations

import mmap
import os
import struct
import tempfile
import time
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
#: What their seconds are counted as.
COUNTED = ("train", "loader", "validation", "save", "other")
_STEP = ("training_step", "backward", "optimizer step")
#: Changes inside a step, which cost no clock.
_PARTS_OF_STEP = frozenset(_NUMBERS[phase] for phase in _STEP)
_COUNTED_AS = [
    COUNTED.index("train" if phase in _STEP else phase if phase in COUNTED else "other")
    for phase in PHASES
]
_LAYOUT = struct.Struct("=qqqq")


class Place:
    """The phase, step, epoch and batch that a rank is in.

    Lies in memory until `share` moves it to a file that other processes of the machine map:
    what a killed process wrote there is still there.

    It counts where time goes once `count_seconds` was called, and costs no clock before.
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
            tell: the function, beside those that are there; None for no more of any. Without one
                nobody pays for this.
        """
        own = vars(self)
        if tell is None:
            own.pop("enter", None)
            own.pop("enter_step", None)
            return
        note, note_step = self.enter, self.enter_step

        def enter(phase: str) -> None:
            tell(phase)
            note(phase)

        def enter_step(step: int, epoch: int, batch: int) -> None:
            tell("training_step")
            note_step(step, epoch, batch)

        own.update(enter=enter, enter_step=enter_step)

    def count_seconds(self, clock: Callable[[], float] = time.perf_counter) -> CountingPlace:
        """Count where time goes, from now on; the same object, with its count at 0.

        Costs three calls of the clock a step, a microsecond in all.
        """
        # Not a second object: the loop and others hold this one.
        self.__class__ = CountingPlace
        assert isinstance(self, CountingPlace)
        self.begin(clock)
        return self

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


class CountingPlace(Place):
    """A place that counts seconds; see `Place.count_seconds`.

    The clock is the host's: what runs on an accelerator counts where the host waits for it.
    """

    def begin(self, clock: Callable[[], float]) -> None:
        """Count from 0."""
        self._clock, self._since = clock, clock()
        self._counted = [0.0] * len(COUNTED)

    def enter(self, phase: str) -> None:
        """Say what comes now, and count what came before it."""
        number, numbers = _NUMBERS[phase], self._numbers
        if number in _PARTS_OF_STEP:
            numbers[0] = number
            return
        now = self._clock()
        self._counted[_COUNTED_AS[numbers[0]]] += now - self._since
        self._since, numbers[0] = now, number

    def enter_step(self, step: int, epoch: int, batch: int) -> None:
        """Say that a batch goes into ``training_step``, and count what came before it."""
        now, numbers = self._clock(), self._numbers
        self._counted[_COUNTED_AS[numbers[0]]] += now - self._since
        self._since = now
        numbers[0], numbers[1], numbers[2], numbers[3] = _TRAINING_STEP, step, epoch, batch

    @property
    def seconds(self) -> dict[str, float]:
        """By what is in `COUNTED`, with what is under way."""
        found = list(self._counted)
        found[_COUNTED_AS[self._numbers[0]]] += self._clock() - self._since
        return dict(zip(COUNTED, found, strict=True))

    @property
    def seconds_here(self) -> float:
        """Since what is under way began."""
        return self._clock() - self._since

    def stop_counting(self) -> None:
        """Be a place that costs no clock again."""
        self.__class__ = Place  # type: ignore[assignment]


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
