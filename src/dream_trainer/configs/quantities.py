"""Durations and sizes as people write them: ``30m``, ``512MiB``. They print as they were given."""

from __future__ import annotations

import math
import re
from datetime import timedelta
from typing import TYPE_CHECKING, Any

_SECONDS = {"w": 604800.0, "d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
_PART = r"(\d+(?:\.\d+)?)({})".format("|".join(sorted(_SECONDS, key=len, reverse=True)))
_PARTS = re.compile(rf"(?:{_PART}\s*)+")
_CLOCK = re.compile(r"(?:(\d+)[-:](?=\d+:\d+:))?(\d+):([0-5]?\d):([0-5]?\d(?:\.\d+)?)")
_BYTES: dict[str, int] = {
    f"{prefix}{unit}".lower(): base**power
    for power, prefix in enumerate(("", "k", "m", "g", "t", "p"))
    for unit, base in (("b", 1000), ("ib", 1024))
    if prefix or unit == "b"
}
_TOO_LARGE = 1e300
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgtp]?i?b)", re.IGNORECASE)


class Duration(float):
    """Seconds, that print as they were written: ``30m`` stays ``30m``, and 1800 stays 1800.

    It computes and compares as the number of its seconds.

    Attributes:
        text: what was given.
    """

    text: str

    def __new__(cls, value: float | str | timedelta) -> Duration:
        """Read it.

        Args:
            value: a number of seconds; a ``timedelta``; or text: ``30s``, ``1h30m``, ``1.5h``,
                ``2d``, ``250ms``, with units ``w d h m s ms`` from large to small; ``00:30:00``
                (hours, minutes, seconds, with days in front as ``2-12:00:00`` or ``2:12:00:00``).

        Raises:
            ValueError: it is none of these, or below zero.
        """
        if isinstance(value, Duration):
            text = value.text
        else:
            text = duration_text(value) if isinstance(value, timedelta) else str(value).strip()
        seconds = _seconds(value)
        if seconds is None or not 0 <= seconds < math.inf:
            raise ValueError(
                f"{_shown(value)} is not a duration: write 30s, 30m, 1h30m, 2d or seconds"
            )
        made = super().__new__(cls, seconds)
        made.text = text
        return made

    @property
    def plain(self) -> int | float | str:
        """What stands in a file for it: a number if it was given as one, else its text."""
        return _plain(self.text)

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"Duration({self.plain!r})"

    # Written out, or type checkers take `== 1800` for a slip between two types.
    def __eq__(self, other: object) -> bool:
        return super().__eq__(other)

    __hash__ = float.__hash__

    def __reduce__(self) -> tuple[type[Duration], tuple[str]]:
        return Duration, (self.text,)


class Size(int):
    """Bytes, that print as they were written: ``512MiB`` stays ``512MiB``, and 1024 stays 1024.

    It computes and compares as the number of its bytes.

    Attributes:
        text: what was given.
    """

    text: str

    def __new__(cls, value: float | str) -> Size:
        """Read it.

        Args:
            value: a number of bytes, or text: ``512MiB``, ``1.5GiB`` (powers of 1024), ``2GB``
                (powers of 1000). Upper and lower case mean the same.

        Raises:
            ValueError: it is neither, below zero, or no whole number of bytes.
        """
        number = _bytes(value)
        if number is None or number < 0:
            raise ValueError(f"{_shown(value)} is not a size: write 512MiB, 2GB or bytes")
        if not float(number).is_integer():
            raise ValueError(f"{_shown(value)} is not a whole number of bytes: it is {number}")
        made = super().__new__(cls, number)
        made.text = value.text if isinstance(value, Size) else str(value).strip()
        return made

    @property
    def plain(self) -> int | float | str:
        """What stands in a file for it: a number if it was given as one, else its text."""
        return _plain(self.text)

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"Size({self.plain!r})"

    # Written out, or type checkers take `== 1800` for a slip between two types.
    def __eq__(self, other: object) -> bool:
        return super().__eq__(other)

    __hash__ = int.__hash__

    def __reduce__(self) -> tuple[type[Size], tuple[str]]:
        return Size, (self.text,)


if TYPE_CHECKING:
    # A field takes what users write and gives a Duration: only a descriptor says so to a checker.
    class DurationField:
        """A `Duration`; may be given as anything that one is made of."""

        def __get__(self, instance: object, owner: Any = None) -> Duration: ...

        def __set__(self, instance: object, value: float | str | timedelta) -> None: ...

    class OptionalDurationField:
        """A `Duration` or None; may be given as anything that one is made of."""

        def __get__(self, instance: object, owner: Any = None) -> Duration | None: ...

        def __set__(self, instance: object, value: float | str | timedelta | None) -> None: ...

else:
    DurationField = Duration
    OptionalDurationField = Duration | None


def duration_text(value: timedelta) -> str:
    """A ``timedelta`` as a duration is written: ``1h30m``."""
    if value < timedelta(0):
        return f"-{duration_text(-value)}"
    left = value // timedelta(microseconds=1)
    parts = []
    for unit in ("d", "h", "m"):
        count, left = divmod(left, int(_SECONDS[unit] * 1_000_000))
        parts += [f"{count}{unit}"] if count else []
    if left or not parts:
        is_short = not parts and 0 < left < 1_000_000
        number, unit = (left / 1000, "ms") if is_short else (left / 1_000_000, "s")
        parts.append(f"{number:.6f}".rstrip("0").rstrip(".") + unit)
    return "".join(parts)


def convert_durations(of: Any, *names: str, may_be_none: bool = False) -> list[str]:
    """Make each of some attributes a `Duration` above 0; None stays None where that is allowed.

    Returns:
        What is wrong with those that are left as they are, a sentence each.
    """
    problems = []
    for name in names:
        if (value := getattr(of, name)) is None and may_be_none:
            continue
        try:
            made = Duration(value)
        except ValueError as error:
            problems.append(f"{name}={error}")
            continue
        setattr(of, name, made)
        if made == 0:
            problems.append(f"{name}={made} is not a duration above 0")
    return problems


def _seconds(value: object) -> float | None:
    if isinstance(value, timedelta):
        return value.total_seconds()
    if not isinstance(value, str):
        return _number(value)
    text = value.strip()
    if (number := _number(text)) is not None:
        return number
    if (clock := _CLOCK.fullmatch(text)) is not None:
        days, hours, minutes, seconds = (float(part or 0) for part in clock.groups())
        return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if _PARTS.fullmatch(text) is None:
        return None
    parts = re.findall(_PART, text)
    units = [_SECONDS[unit] for _, unit in parts]
    if units != sorted(set(units), reverse=True):
        return None  # 30m1h, 1m1m: more likely a slip than meant
    return math.fsum(float(number) * _SECONDS[unit] for number, unit in parts)


def _bytes(value: object) -> float | None:
    if not isinstance(value, str) or (found := _SIZE.fullmatch(value.strip())) is None:
        return _number(value)
    number, unit = found.groups()
    factor = _BYTES[unit.lower()]
    return int(number) * factor if number.isdigit() else float(number) * factor


def _number(value: object) -> int | float | None:
    """A number, or text of one; not a truth value, NaN or what no float holds."""
    if isinstance(value, str):
        value = _plain(value.strip(), exactly=False)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return value if abs(value) < _TOO_LARGE else None


def _plain(text: str, *, exactly: bool = True) -> int | float | str:
    """The number that a text is, if there is one; if it must print as exactly that text."""
    for kind in (int, float):
        try:
            number: int | float = kind(text)
        except ValueError:
            continue
        if not exactly or str(number) == text:
            return number
    return text


def _shown(value: object) -> str:
    return repr(value) if isinstance(value, (str, int, float)) else str(value)
