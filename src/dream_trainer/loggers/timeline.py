"""The file that tells what happened to a run, and when: one JSON object a line, never cut."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

#: In a run's directory.
TIMELINE_NAME = "timeline.jsonl"


class TimelineFile:
    """Appends events to a file, each in one write; an error is told once and ends nothing.

    Args:
        path: the file; made with the first event, and its folder with it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._descriptor: int | None = None
        self._is_line_open = self._has_failed = False

    def write(self, event: Mapping[str, Any]) -> None:
        """Append an event. After a half line, of a killed process or a full disk, on a new one."""
        try:
            if self._descriptor is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._is_line_open = not _ends_with_line(self.path)
                flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_CLOEXEC", 0)
                self._descriptor = os.open(self.path, flags, 0o666)
            line = ("\n" if self._is_line_open else "") + json.dumps(event) + "\n"
            data = line.encode()
            written = os.write(self._descriptor, data)
            if written < len(data):
                self._is_line_open = data[written - 1 : written] != b"\n"
                raise OSError(f"only {written} of {len(data)} bytes were written")
            self._is_line_open = False
        except OSError as error:
            if not self._has_failed:
                self._has_failed = True
                text = f"{self.path} misses events of the run, which goes on: {error}"
                warnings.warn(text, RuntimeWarning, stacklevel=2)

    def close(self) -> None:
        """Close the file; a later event opens it again."""
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            os.close(descriptor)


def _ends_with_line(path: Path) -> bool:
    """Also where there is nothing yet."""
    try:
        with path.open("rb") as file:
            if not file.seek(0, os.SEEK_END):
                return True
            file.seek(-1, os.SEEK_END)
            return file.read() == b"\n"
    except FileNotFoundError:
        return True
