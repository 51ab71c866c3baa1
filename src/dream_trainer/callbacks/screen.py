"""Where progress is drawn: a terminal, a notebook, or lines of text."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from dream_trainer.lazy_names import loading

if TYPE_CHECKING:
    from rich.console import Console, RenderableType


@dataclass(frozen=True)
class Bar:
    """One bar.

    Args:
        title: what is counted, ``"epoch 3/20"``.
        unit: of the count, ``"batch"``.
        done: how many.
        total: of how many; None if that is not known.
        pace: how fast, in words.
        times: how long, in words.
    """

    title: str
    unit: str
    done: int
    total: int | None
    pace: str = ""
    times: str = ""


class Screen(Protocol):
    """What progress is drawn on."""

    has_bars: bool
    """Whether `draw` shows anything."""

    def draw(self, bars: Sequence[Bar], values: str) -> None:
        """Show these in place of what was drawn before."""

    def line(self, text: str) -> None:
        """Say something that stays."""

    def close(self) -> None:
        """Take away what is drawn."""


def as_text(*parts: RenderableType, width: int) -> str:
    """What is drawn in colours on a terminal, in plain text of so many columns."""
    with loading():
        from rich.console import Console

    console = Console(file=io.StringIO(), width=width, color_system=None)
    for part in parts:
        console.print(part)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines())


def new_console() -> Console:
    """A console on standard output."""
    with loading():
        from rich.console import Console

    # What FORCE_COLOR asks for in a CI are colours, not the movements of a cursor.
    return Console(force_interactive=None if sys.stdout.isatty() else False)


def open_screen(console: Console) -> Screen:
    """The kind of screen that a console is."""
    if console.is_jupyter:
        return NotebookScreen(console)
    return TerminalScreen(console) if console.is_interactive else LineScreen(console)


class LineScreen:
    """A log: lines only."""

    has_bars = False

    def __init__(self, console: Console) -> None:
        self._console = console

    def draw(self, bars: Sequence[Bar], values: str) -> None:
        """Nothing."""

    def line(self, text: str) -> None:
        """Print it, without a break."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Nothing."""


class TerminalScreen(LineScreen):
    """Bars below everything else that is printed meanwhile.

    Nothing is drawn by a thread of its own: a loader's workers are forked, and one that is forked
    while a thread prints would wait for its lock for ever.
    """

    has_bars = True

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        with loading():
            from rich.live import Live

        is_shared = sys.stderr is not None and sys.stderr.isatty()
        handlers = list(_handlers())
        originals = {id(sys.stdout): "stdout", id(sys.stderr): "stderr"}
        self._live = Live(
            console=console,
            auto_refresh=False,
            transient=True,
            redirect_stderr=is_shared,  # in a file it stays in that file
        )
        self._live.start()
        # A logger's handler keeps the stream that it was made with, and would write into the bars.
        self._redirected: list[tuple[logging.StreamHandler[Any], Any]] = []
        for handler in handlers:
            name = originals.get(id(handler.stream))
            if name is not None and (old := handler.setStream(getattr(sys, name))) is not None:
                self._redirected.append((handler, old))

    def draw(self, bars: Sequence[Bar], values: str) -> None:
        """Move the bars."""
        self._live.update(_drawn(bars, values), refresh=True)

    def close(self) -> None:
        """Take the bars away, and give streams back."""
        self._live.stop()
        for handler, stream in self._redirected:
            handler.setStream(stream)
        self._redirected = []


class NotebookScreen(LineScreen):
    """Bars in one output of a cell, which is replaced again and again."""

    has_bars = True

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._handle: Any = None

    def draw(self, bars: Sequence[Bar], values: str) -> None:
        """Replace them. Nothing else is needed than IPython, which a notebook has."""
        self._show(_drawn(bars, values))

    def line(self, text: str) -> None:
        """Print it as a program would: rich makes an output of its own of every line."""
        print(text)

    def close(self) -> None:
        """Leave nothing behind."""
        if self._handle is not None:
            from rich.text import Text

            self._show(Text(""))
            self._handle = None

    def _show(self, drawn: RenderableType) -> None:
        from IPython.display import display

        if self._handle is None:
            self._handle = display(drawn, display_id=True)
        else:
            self._handle.update(drawn)


def _drawn(bars: Sequence[Bar], values: str) -> RenderableType:
    with loading():
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

    table = Table.grid(padding=(0, 2, 0, 0), expand=True)
    for ratio in (None, 1, None, None, None):
        table.add_column(ratio=ratio, no_wrap=True)
    for bar in bars:
        count = f"{bar.done}" if bar.total is None else f"{bar.done:>{len(str(bar.total))}}"
        of = "" if bar.total is None else f"/{bar.total}"
        table.add_row(
            Text(bar.title, style="bold"),
            ProgressBar(total=bar.total, completed=bar.done) if bar.total else "",
            Text(f"{bar.unit} {count}{of}", style="cyan"),
            Text(bar.pace, style="magenta", justify="right"),
            Text(bar.times, style="green"),
        )
    # A notebook takes what rich can make HTML of: a table, and no Group.
    drawn = Table.grid(expand=True)
    drawn.add_row(table)
    if values:
        drawn.add_row(Text(values))
    return drawn


def _handlers() -> Iterator[logging.StreamHandler[Any]]:
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    for logger in loggers:
        for handler in getattr(logger, "handlers", ()):
            if isinstance(handler, logging.StreamHandler):
                yield handler


__all__ = [
    "Bar",
    "LineScreen",
    "NotebookScreen",
    "Screen",
    "TerminalScreen",
    "new_console",
    "open_screen",
]
