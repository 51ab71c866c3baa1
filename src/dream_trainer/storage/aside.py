"""Renaming what is in the way; nothing is overwritten or deleted."""

from __future__ import annotations

from pathlib import Path


def move_aside(path: Path, reason: str) -> Path:
    """Rename a file or directory to ``<name>.<reason>-<n>``; nothing is deleted."""
    return path.rename(free_name(path, reason))


def free_name(path: Path, reason: str) -> Path:
    """``<name>.<reason>-<n>`` beside a path, with the first n that is not taken."""
    n = 1
    while (target := path.with_name(f"{path.name}.{reason}-{n}")).exists():
        n += 1
    return target
