"""What a run says on a terminal: a real run of examples/digits."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import tempfile
import termios
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.text import Text

EXAMPLE = Path(__file__).parents[2] / "examples" / "digits" / "train.py"
WIDTH, HEIGHT = 112, 60
_ESCAPE = re.compile(r"\x1b\[[?0-9;]*[A-Za-z]|\r\n|\r|\n")
_DURING = re.compile(r"epoch 4/20.*batch 1\d/23")


class Screen:
    """As much of a terminal as rich's live display uses."""

    def __init__(self) -> None:
        self.lines = [""]
        self._row = 0

    def feed(self, text: str) -> None:
        """Show what a program wrote."""
        position = 0
        for found in _ESCAPE.finditer(text):
            self.lines[self._row] += text[position : found.start()]
            position, code = found.end(), found[0]
            if code.endswith("\n"):
                self._row += 1
                self.lines += [""] * (self._row == len(self.lines))
            elif code.endswith("A"):
                self._row -= int(code[2:-1] or 1)
            elif code == "\x1b[2K":
                self.lines[self._row] = ""
            elif code.endswith("m"):
                self.lines[self._row] += code
        self.lines[self._row] += text[position:]

    def __str__(self) -> str:
        return "\n".join(self.lines).rstrip()


def shown(command: list[str], folder: Path) -> Iterator[Screen]:
    """The screen of a program, each time that something was written."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", HEIGHT, WIDTH, 0, 0))
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": str(WIDTH)}
    process = subprocess.Popen(
        command, cwd=folder, stdin=slave, stdout=slave, stderr=slave, env=environment
    )
    os.close(slave)
    screen, pending = Screen(), b""
    while True:
        try:
            pending += os.read(master, 1 << 16)
        except OSError:  # how Linux tells that nobody writes any more
            break
        if pending.endswith((b"\n", b" ", b"m")):
            screen.feed(pending.decode())
            pending = b""
            yield screen
    os.close(master)
    if process.wait():
        raise SystemExit(f"{' '.join(command)} failed:\n{screen}")


def picture(text: str, title: str, path: Path) -> None:
    """Write a terminal's text as an SVG."""
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    console.print(Text.from_ansi(text))
    path.write_text(console.export_svg(title=title), encoding="utf-8")


def main(folder: Path) -> None:
    """Write ``progress_start.svg`` and ``progress_end.svg``."""
    start = end = ""
    with tempfile.TemporaryDirectory() as place:
        for screen in shown([sys.executable, str(EXAMPLE), "fit"], Path(place)):
            end = str(screen)
            if not start and _DURING.search(Text.from_ansi(end).plain):
                start = end
    title = "python examples/digits/train.py fit"
    picture(start, title, folder / "progress_start.svg")
    picture("\n".join(end.splitlines()[-10:]), title, folder / "progress_end.svg")
