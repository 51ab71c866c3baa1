"""Numbers, durations and tables in words."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def counted(number: int, one: str, several: str | None = None) -> str:
    """``1 file``, ``2 files``; ``2 batches`` with a plural of its own."""
    return f"{number:,} {one if number == 1 else several or f'{one}s'}"


def percent(share: float) -> str:
    """``97.3 %``."""
    return f"{100 * share:.1f} %"


def duration(seconds: float) -> str:
    """In the two largest units: ``2 h 05 min``, ``41.2 s``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02d} min"
    return f"{hours // 24} d {hours % 24} h"


def aligned(rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> list[str]:
    """Lines of a table, one for each row.

    Args:
        rows: cells, as many in each; the first row may be a head.
        left: columns whose cells begin at the left; numbers end at the right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
