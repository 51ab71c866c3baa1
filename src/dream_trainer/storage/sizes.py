"""Bytes in words."""

from __future__ import annotations


def size(number: int | None) -> str:
    """Bytes for people: ``"2.52 GiB"``; exact below 1 KiB."""
    if number is None:
        return "unknown"
    value, unit = float(number), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB", "PiB"):
        if value < 1000:
            break
        value, unit = value / 1024, larger
    return f"{number} B" if unit == "B" else f"{value:.3g} {unit}"
