"""Pace: how fast something is counted, and how long the rest of it takes."""

from __future__ import annotations

from collections import deque

#: Marks that a pace has at least, however long ago they were.
_FEWEST = 5


class Pace:
    """Counts per second, from marks of when the count was what.

    The first mark is where it begins: what took long before it, compiling say, or what another
    process counted before a restart, has no part in it.

    Args:
        window: seconds to look back; None looks back to the first mark.
    """

    def __init__(self, window: float | None = None) -> None:
        self._window = window
        self._marks: deque[tuple[float, int]] = deque()
        self._left_out = 0.0

    def mark(self, now: float, count: int) -> None:
        """Note a count.

        Args:
            now: seconds from any start.
            count: of what is counted, from any start.
        """
        now -= self._left_out
        marks = self._marks
        if self._window is None:
            if len(marks) > 1:
                marks.pop()
        else:
            while len(marks) >= _FEWEST and marks[1][0] < now - self._window:
                marks.popleft()
        marks.append((now, count))

    def leave_out(self, seconds: float) -> None:
        """Time in which something else was done."""
        self._left_out += seconds

    @property
    def per_second(self) -> float | None:
        """None as long as there is too little to tell."""
        if len(self._marks) < 2:
            return None
        (start, first), (end, last) = self._marks[0], self._marks[-1]
        return (last - first) / (end - start) if end > start and last > first else None

    def seconds_for(self, count: int) -> float | None:
        """How long so many take; None if that is not known."""
        rate = self.per_second
        return None if rate is None else max(count, 0) / rate


def rate_in_words(rate: float | None, one: str, several: str) -> str:
    """``"17.2 steps/s"``, or ``"3.5 s/step"`` if one takes longer than a second; else empty."""
    if rate is None:
        return ""
    return f"{rate:.3g} {several}/s" if rate >= 1 else f"{1 / rate:.3g} s/{one}"


def duration_in_words(seconds: float | None) -> str:
    """``"0:00:04"``, ``"1:02:03"``, ``"2 d 03:04:05"``; empty if it is not known."""
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    clock = f"{minutes:02}:{rest:02}"
    return f"{days} d {hours:02}:{clock}" if days else f"{hours}:{clock}"


__all__ = ["Pace", "duration_in_words", "rate_in_words"]
