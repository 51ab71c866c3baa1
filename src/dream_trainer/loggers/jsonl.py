"""The exact metrics log: one JSON object a line, no gap and no double after any restart."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO


class JsonlLog:
    """Appends rows to a file whose length is part of a run's state.

    A checkpoint stores `size`; a resumed run cuts the file to it before it writes, so
    rows that the killed run wrote after its last checkpoint do not appear twice.

    Args:
        path: the file; made when the first row is written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file: BinaryIO | None = None

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.path.stat().st_size if self.path.exists() else 0

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
        elif self.size > size:
            os.truncate(self.path, size)

    def write(self, rows: Iterable[Mapping[str, object]]) -> None:
        """Append rows and make them survive a power cut."""
        text = "".join(json.dumps(_strict(row), allow_nan=False) + "\n" for row in rows)
        if not text:
            return
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab")
        self._file.write(text.encode())
        self._file.flush()
        os.fsync(self._file.fileno())

    def read(self) -> list[dict[str, float]]:
        """All rows; values that are not finite come back as floats."""
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").splitlines()
        return [
            {k: float(v) if isinstance(v, str) else v for k, v in json.loads(line).items()}
            for line in lines
        ]

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
