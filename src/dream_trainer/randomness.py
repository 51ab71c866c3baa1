"""Random streams: derived seeds, and saving, setting and isolating the global generators."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

_MASK = (1 << 64) - 1


def derive(*parts: int | str) -> int:
    """A 64-bit seed that is a pure function of its parts, the same in every process.

    The mixing function is SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom
    number generators", 2014), which sends neighbouring inputs to unrelated outputs.
    """
    value = 0
    for part in parts:
        number = zlib.crc32(part.encode()) if isinstance(part, str) else part
        value = ((value ^ (number & _MASK)) + 0x9E3779B97F4A7C15) & _MASK
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
        value ^= value >> 31
    return value


def seed_cpu(seed: int) -> None:
    """Seed ``random``, ``numpy`` and torch's CPU generator; accelerators are left alone."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)


def seed_everything(seed: int) -> None:
    """Seed ``random``, ``numpy`` and torch on every device."""
    seed_cpu(seed)
    torch.manual_seed(seed)


#: What ``random``, ``numpy`` and torch's CPU generator give as their state.
RawState = tuple[Any, Any, torch.Tensor]


def raw_state() -> RawState:
    """State of the CPU generators, in their own forms."""
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def set_raw_state(state: RawState) -> None:
    """The inverse of `raw_state`."""
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])


def encode_state(state: RawState) -> dict[str, Any]:
    """A raw state as plain data and tensors."""
    version, words, gauss = state[0]
    name, keys, *rest = state[1]
    return {
        "python": (version, torch.tensor(words, dtype=torch.int64), gauss),
        "numpy": (str(name), torch.from_numpy(keys.astype(np.int64)), *map(_plain, rest)),
        "torch": state[2],
    }


def decode_state(state: Mapping[str, Any]) -> RawState:
    """The inverse of `encode_state`."""
    version, words, gauss = state["python"]
    name, keys, *rest = state["numpy"]
    return (
        (version, tuple(words.tolist()), gauss),
        (name, keys.numpy().astype(np.uint32), *rest),
        state["torch"],
    )


@contextmanager
def preserved() -> Iterator[None]:
    """Leave the CPU generators after the block as they were before it."""
    outer = raw_state()
    try:
        yield
    finally:
        set_raw_state(outer)


def rng_state() -> dict[str, Any]:
    """State of every global generator of this process, accelerators included."""
    state = encode_state(raw_state())
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    """The inverse of `rng_state`. Accelerators that are not here are passed over."""
    set_raw_state(decode_state(state))
    if "cuda" in state and torch.cuda.is_available():
        for index, device_state in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(device_state, index)
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])


def _plain(number: Any) -> Any:
    return number.item() if isinstance(number, np.generic) else number
