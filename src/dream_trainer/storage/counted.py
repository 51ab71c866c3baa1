"""Files whose checksums are taken while they are written, by another core."""

from __future__ import annotations

import io
import os
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystem

_CHUNK = 1 << 20


class CountedFiles(FileSystem):
    """The file system of a ``FileSystemWriter``, which knows the CRC-32 of what it has written.

    Reading files back when they are complete would take a third as long as writing them.

    Attributes:
        crc32: by the path of a file.
    """

    def __init__(self) -> None:
        self.crc32: dict[Path, int] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        """Open a file; one that is written is counted."""
        if mode != "wb":
            with super().create_stream(path, mode) as stream:
                yield stream
            return
        with (
            Path(path).open("wb", buffering=0) as file,
            _Follower(Path(path)) as follower,
            _Told(file, follower) as stream,
        ):
            yield stream
        if follower.crc32 is not None:
            self.crc32[Path(path)] = follower.crc32

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        """Rename a file."""
        super().rename(path, new_path)
        if (known := self.crc32.pop(Path(path), None)) is not None:
            self.crc32[Path(new_path)] = known


class _Told(io.BufferedWriter):
    """Tells a follower how far it is."""

    def __init__(self, file: io.FileIO, follower: _Follower) -> None:
        super().__init__(file, buffer_size=1 << 20)
        self._follower, self._num_new = follower, 0

    def write(self, data: Any) -> int:
        self._num_new += len(data)
        if self._num_new >= _CHUNK:
            self._num_new = 0
            self._follower.go_on()
        return super().write(data)


class _Follower:
    """Reads behind a writer, from memory, for what it writes was just there.

    Attributes:
        crc32: of the whole file, after the block; None if it could not be read, or no thread begun.
    """

    def __init__(self, path: Path) -> None:
        self.crc32: int | None = None
        self._path, self._is_complete = path, False
        self._more = threading.Event()
        self._thread = threading.Thread(target=self._run, name="checksum", daemon=True)

    def __enter__(self) -> _Follower:
        try:
            self._reader = os.open(self._path, os.O_RDONLY)
            self._thread.start()
        except (OSError, RuntimeError):  # the interpreter ends, and starts no more threads
            self._thread = threading.Thread()
        return self

    def __exit__(self, *error: object) -> None:
        self._is_complete = True
        self.go_on()
        if self._thread.ident is not None:
            self._thread.join()
            os.close(self._reader)

    def go_on(self) -> None:
        """There is more to read."""
        self._more.set()

    def _run(self) -> None:
        value = position = 0
        try:
            while True:
                self._more.wait()
                self._more.clear()
                is_complete = self._is_complete  # before reading: after it nothing is added
                while chunk := os.pread(self._reader, _CHUNK, position):
                    value = zlib.crc32(chunk, value)
                    position += len(chunk)
                if is_complete:
                    self.crc32 = value
                    return
        except OSError:
            return  # whoever reads the file next says why
