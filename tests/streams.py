"""The global random streams of a process, before and after."""

from __future__ import annotations

import random
import sys
from typing import Any


def rng_streams() -> dict[str, Any]:
    """State of the global streams of the modules that are loaded."""
    streams: dict[str, Any] = {"random": random.getstate()}
    if (numpy := sys.modules.get("numpy")) is not None:
        streams["numpy"] = numpy.random.get_state()
    if (torch := sys.modules.get("torch")) is not None:
        streams["torch"] = torch.get_rng_state()
    return streams


def restore_rng_streams(streams: dict[str, Any]) -> None:
    random.setstate(streams["random"])
    if "numpy" in streams:
        sys.modules["numpy"].random.set_state(streams["numpy"])
    if "torch" in streams:
        sys.modules["torch"].set_rng_state(streams["torch"])


def same_streams(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return not differing_streams(one, other)


def differing_streams(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    return [name for name in one if not _same(one[name], other[name])]


def _same(one: Any, other: Any) -> bool:
    """Whether two states of the same stream are equal; numpy's and torch's hold arrays."""
    if isinstance(one, tuple):
        return all(_same(a, b) for a, b in zip(one, other, strict=True))
    if hasattr(one, "tobytes"):
        return bool(one.tobytes() == other.tobytes())
    return bool(one.equal(other) if hasattr(one, "equal") else one == other)
