"""Tables without lines: rich ones on a terminal, aligned text in files and pipes."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence

from dream_trainer.words import aligned

_WIDEST = 10_000
_PIPE_STATUS = 141  # as a shell reports a program that SIGPIPE has ended

#: Rows of cells. A cell that begins with spaces is indented.
Rows = Sequence[Sequence[str]]


def print_table(columns: Sequence[str], rows: Rows, right: Sequence[str] = ()) -> None:
    """Print a table.

    Args:
        columns: headings.
        rows: as many cells each as there are columns.
        right: headings of the columns that are aligned to the right, numbers for example.
    """
    if sys.stdout.isatty():
        _print_rich(columns, rows, right)
    else:
        left = [index for index, name in enumerate(columns) if name not in right]
        print("\n".join(aligned([columns, *rows], left)))


@contextlib.contextmanager
def until_nobody_reads() -> Iterator[None]:
    """Ends the program quietly once the other end of a pipe, ``head`` say, has read enough."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more as it ends, and would complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(_PIPE_STATUS) from None


def print_heading(text: str) -> None:
    """Print a line above a table."""
    print(f"\033[1m{text}\033[0m" if sys.stdout.isatty() else text)


def number(value: float | str | None) -> str:
    """A measured value in a few digits; ``-`` where there is none."""
    if value is None:
        return "-"
    return f"{value:.6g}" if isinstance(value, (int, float)) else value


def moment(saved_at: str | None) -> str:
    """``2026-11-24 04:41`` of a time in ISO 8601."""
    return saved_at[:16].replace("T", " ") if saved_at else "-"


def _print_rich(columns: Sequence[str], rows: Rows, right: Sequence[str]) -> None:
    # Here, because it takes longer to load than a listing takes.
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        justify = "right" if column in right else "left"
        table.add_column(Text(column), justify=justify, overflow="fold")  # type: ignore[arg-type]
    for row in rows:
        # As text: a name in brackets is no markup.
        table.add_row(*map(Text, row))
    console = Console()
    # A line that is too long is left to the terminal: a name cut in two cannot be copied.
    wide = console.options.update(max_width=_WIDEST)
    console.width = max(console.width, console.measure(table, options=wide).maximum)
    console.print(table)
