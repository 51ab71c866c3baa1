"""The exact metrics log: one JSON object a line, no gap and no double after any restart."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Iterable, Mapping
from io import FileIO
from pathlib import Path

from dream_trainer.storage import move_aside


class JsonlLog:
    """Appends rows to a file whose length is part of a run's state.

    A checkpoint stores `size`; a resumed run cuts the file to it before it writes, so
    rows that the killed run wrote after its last checkpoint do not appear twice.

    Args:
        path: the file; made when the first row is written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file: FileIO | None = None

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.path.stat().st_size if self.path.exists() else 0

    def start_afresh(self) -> None:
        """Rename what an earlier run has left; nothing is deleted."""
        if self.size:
            move_aside(self.path, "superseded")

    def cut(self, size: int) -> None:
        """Drop everything after ``size`` bytes.

        A file that is shorter than that has lost rows; this is reported, not repaired.
        """
        if self.size < size:
            warnings.warn(
                f"{self.path} has {self.size} bytes, the checkpoint expects {size}: "
                "rows are missing, was the file edited?",
                stacklevel=2,
            )
            self._end_line()
        elif self.size > size:
            os.truncate(self.path, size)

    def write(self, rows: Iterable[Mapping[str, object]]) -> None:
        """Append rows and make them survive a power cut.

        Raises:
            OSError: they could not be written; the file is as it was before.
        """
        text = "".join(json.dumps(_strict(row), allow_nan=False) + "\n" for row in rows)
        if not text:
            return
        before = self.size
        try:
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self.path.open("ab", buffering=0)
            unwritten = memoryview(text.encode())
            while unwritten:
                unwritten = unwritten[self._file.write(unwritten) :]
            os.fsync(self._file.fileno())
        except OSError:
            if self.size > before:
                os.truncate(self.path, before)  # half a row would spoil the one after it
            raise

    def read(self) -> list[dict[str, float]]:
        """All rows; values that are not finite come back as floats."""
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").splitlines()
        return [
            {k: float(v) if isinstance(v, str) else v for k, v in json.loads(line).items()}
            for line in lines
        ]

    def _end_line(self) -> None:
        """Let the next row begin a line of its own."""
        if self.size:
            with self.path.open("rb+") as file:
                file.seek(-1, os.SEEK_END)
                if file.read() != b"\n":
                    file.write(b"\n")

    def close(self) -> None:
        """Close the file; a later write opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _strict(row: Mapping[str, object]) -> dict[str, object]:
    """JSON has no NaN and no infinity; they are written as words."""
    return {
        key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }
