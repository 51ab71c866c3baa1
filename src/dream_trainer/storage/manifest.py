"""The manifest: what a checkpoint directory holds, and the proof that it is whole."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from dream_trainer.errors import CheckpointError
from dream_trainer.storage.atomic import write_text

FORMAT_VERSION = 1
_NAME = "manifest.json"
_CHUNK = 1 << 22


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Facts about one checkpoint. Written last: without it a directory is no checkpoint."""

    files: Mapping[str, Mapping[str, int]]
    """File name -> ``{"bytes": size, "crc32": checksum}``."""
    step: int
    """Optimizer steps taken when it was saved."""
    epoch: int
    """Epochs completed when it was saved."""
    world_size: int
    """Ranks that wrote it."""
    monitor: str | None = None
    """Name of the monitored metric."""
    monitored: float | str | None = None
    """Its value; ``"nan"``, ``"inf"`` and ``"-inf"`` as words, since JSON has no such numbers."""
    saved_at: str = ""
    """When, in UTC (ISO 8601)."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Versions of torch, lightning and this package."""
    format_version: int = FORMAT_VERSION
    """Layout of the directory."""

    @property
    def monitored_value(self) -> float | None:
        """The monitored value as a number; None if there is none or it is NaN."""
        if self.monitored is None:
            return None
        value = float(self.monitored)
        return None if value != value else value

    def write(self, directory: Path) -> None:
        """Write ``manifest.json``, with a checksum of itself."""
        write_text(directory / _NAME, _text_of(asdict(self)))

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Read ``manifest.json``.

        Raises:
            CheckpointError: it is missing, broken, or of another format version.
        """
        if not directory.is_dir():
            raise CheckpointError(
                str(directory),
                ["there is no such directory"],
                "A checkpoint is a directory with a manifest.json.",
            )
        try:
            text = (directory / _NAME).read_bytes().decode()
            facts = json.loads(text)
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(str(directory), [f"{_NAME}: {error}"]) from error
        if not isinstance(facts, dict):
            raise CheckpointError(str(directory), [f"{_NAME} is no JSON object"])
        facts.pop("checksum", None)
        if facts.get("format_version") != FORMAT_VERSION:
            raise CheckpointError(
                str(directory),
                [
                    f"format version {facts.get('format_version')!r}, "
                    f"this release reads {FORMAT_VERSION}"
                ],
            )
        if text != _text_of(facts) or facts.keys() != {f.name for f in fields(cls)}:
            raise CheckpointError(str(directory), [f"{_NAME} does not match its own checksum"])
        return cls(**facts)

    @property
    def num_bytes(self) -> int:
        """Sizes of all files together."""
        return sum(record["bytes"] for record in self.files.values())

    def verify(self, directory: Path) -> None:
        """Compare sizes and checksums of the files on disk with the manifest.

        Raises:
            CheckpointError: naming every file that is missing or damaged.
        """
        if problems := self.problems(directory):
            raise CheckpointError(str(directory), problems)

    def problems(
        self, directory: Path, *, sizes_only: bool = False, advance: Callable[[int], object] = bool
    ) -> list[str]:
        """What of the files on disk is not as the manifest says; one sentence for each file.

        Args:
            directory: the checkpoint.
            sizes_only: read no file, so that a flipped bit stays unseen.
            advance: called with the number of bytes that were just read.
        """
        problems = []
        for name, expected in self.files.items():
            path = directory / name
            try:
                if not path.is_file():
                    problems.append(f"{name} is missing")
                elif (size := path.stat().st_size) != expected["bytes"]:
                    problems.append(
                        f"{name} has {size} bytes, the manifest says {expected['bytes']}"
                    )
                elif not sizes_only and _crc32(path, advance) != expected["crc32"]:
                    problems.append(f"{name} does not match its checksum")
            except OSError as error:  # a disk that cannot read it back is damage, too
                problems.append(f"{name} cannot be read: {error.strerror}")
        return problems


def checksums(files: Mapping[Path, int | None]) -> dict[str, dict[str, int]]:
    """Sizes in bytes and CRC-32 of files, by name.

    Args:
        files: paths, and the CRC-32 where it is known already.
    """
    return {
        path.name: {
            "bytes": path.stat().st_size,
            "crc32": _crc32(path) if (known := files[path]) is None else known,
        }
        for path in sorted(files)
    }


def _crc32(path: Path, advance: Callable[[int], object] = bool) -> int:
    # CRC-32 finds every single flipped bit and runs at memory speed; it is no protection
    # against an attacker, against whom nothing in a checkpoint is executed on loading.
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            value = zlib.crc32(chunk, value)
            advance(len(chunk))
    return value


def _text_of(facts: Mapping[str, Any]) -> str:
    """The only form that a manifest with these facts can have, with a checksum of them."""
    checksum = zlib.crc32(json.dumps(facts, sort_keys=True).encode())
    return json.dumps({**facts, "checksum": checksum}, indent=2) + "\n"
