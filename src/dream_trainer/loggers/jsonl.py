"""The exact metrics log: one JSON object a line, no gap and no double after any restart."""

from __future__ import annotations

import functools
import json
import os
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping
from io import FileIO
from math import isfinite
from pathlib import Path

from dream_trainer.storage import move_aside

#: In a run's directory.
LOG_NAME = "metrics.jsonl"


class JsonlLog:
    """Appends rows to a file whose length is part of a run's state.

    A checkpoint stores `size` and `crc32`; a resumed run cuts the file to it before it writes, so
    rows that the killed run wrote after its last checkpoint do not appear twice.

    Args:
        path: the file; made when the first row is written.

    Attributes:
        crc32: checksum of what was written, since the file's beginning.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.crc32 = 0
        self._file: FileIO | None = None
        self._synced = (0, 0)

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.path.stat().st_size if self.path.exists() else 0

    def start_afresh(self) -> str:
        """Rename what an earlier run has left; nothing is deleted.

        Returns:
            Its new name; empty if there was nothing.
        """
        self.close()
        self.crc32 = 0
        return move_aside(self.path, "superseded").name if self.size else ""

    def resume(self, size: int, crc32: int) -> bool:
        """Drop everything after the first ``size`` bytes, if they are those of a checkpoint.

        If not, the file was edited or is another run's: it is renamed, and a new one begins.

        Args:
            size: in bytes, when the checkpoint was saved.
            crc32: checksum of those bytes.

        Returns:
            Whether the file goes on.
        """
        if not size:
            self.start_afresh()
            return True
        if self.size < size or self._checksum(size) != crc32:
            kept = self.start_afresh()
            fate = f"it is now {kept}, and " if kept else ""
            warnings.warn(
                f"{self.path} does not begin with the {size} bytes of rows that the checkpoint "
                f"knows: {fate}a new one begins.",
                stacklevel=2,
            )
            return False
        if self.size > size:
            os.truncate(self.path, size)
        self.crc32 = crc32
        return True

    def write(self, rows: Iterable[Mapping[str, object]]) -> None:
        """Append rows. `sync` makes them survive a power cut.

        Raises:
            OSError: they could not be written; the file is as it was before.
        """
        data = "".join([_line(row) for row in rows]).encode()
        if not data:
            return
        unwritten = memoryview(data)
        try:
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self.path.open("ab", buffering=0)
                self._synced = self.size, self.crc32
            while unwritten:
                unwritten = unwritten[self._file.write(unwritten) :]
        except OSError:
            if written := len(data) - len(unwritten):
                os.truncate(self.path, self.size - written)  # half a row would spoil the next one
            raise
        self.crc32 = zlib.crc32(data, self.crc32)

    def sync(self) -> None:
        """Make what was written survive a power cut. Can take milliseconds.

        Raises:
            OSError: it may not.
        """
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._synced = self.size, self.crc32

    def go_back(self) -> None:
        """Drop what was written since the last `sync`, to write it again."""
        size, self.crc32 = self._synced
        if self.size > size:
            os.truncate(self.path, size)

    def read(self) -> list[dict[str, float]]:
        """All rows; values that are not finite come back as floats."""
        return list(self.rows())

    def rows(self) -> Iterator[dict[str, float]]:
        """Rows one by one, while the file may be written by another process.

        Raises:
            ValueError: a line is no row.
        """
        if not self.path.exists():
            return
        with self.path.open(encoding="utf-8", newline="\n") as file:
            for line in file:
                if not line.endswith("\n"):
                    return  # half a row: it is being written, or its process was killed
                row = json.loads(line)
                for name, value in row.items():
                    if type(value) is str:
                        row[name] = float(value)
                yield row

    def _checksum(self, size: int) -> int:
        with self.path.open("rb") as file:
            return zlib.crc32(file.read(size))

    def close(self) -> None:
        """Close the file; a later write opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _line(row: Mapping[str, object]) -> str:
    """A row as ``json.dumps`` writes it, which takes three times as long for a few numbers."""
    fields = [
        f"{_key(k)}{v!r}" if type(v) is int or (type(v) is float and isfinite(v)) else _field(k, v)
        for k, v in row.items()
    ]
    return "{" + ", ".join(fields) + "}\n"


@functools.lru_cache(maxsize=10_000)
def _key(name: str) -> str:
    return json.dumps(name) + ": "


def _field(name: str, value: object) -> str:
    # JSON has no NaN and no infinity; they are written as words.
    is_word = isinstance(value, float) and not isfinite(value)
    return _key(name) + json.dumps(str(value) if is_word else value)
