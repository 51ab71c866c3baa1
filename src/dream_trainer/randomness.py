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


class Apart:
    """A block that leaves the CPU generators as they were before it, for use once a batch.

    NumPy's generator is exchanged for another one: saving and restoring it takes a hundred times
    as long. What it draws first inside the block must be seeded there.
    """

    def __init__(self) -> None:
        self._bits = np.random.MT19937(0)

    def __enter__(self) -> None:
        self._outer = random.getstate(), np.random.mtrand.get_bit_generator(), torch.get_rng_state()
        np.random.mtrand.set_bit_generator(self._bits)

    def __exit__(self, *error: object) -> None:
        python, bits, own_torch = self._outer
        random.setstate(python)
        np.random.mtrand.set_bit_generator(bits)
        torch.set_rng_state(own_torch)


class Stream(Apart):
    """Draws of its own: each block goes on where the last one ended.

    Args:
        seed: of the first block.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._python = random.Random(seed).getstate()
        numpy: Any = np.random.RandomState(seed & 0xFFFFFFFF).get_state(legacy=False)
        self._bits.state = numpy
        self._torch = torch.Generator().manual_seed(seed).get_state()

    def __enter__(self) -> None:
        super().__enter__()
        random.setstate(self._python)
        torch.set_rng_state(self._torch)

    def __exit__(self, *error: object) -> None:
        self._python, self._torch = random.getstate(), torch.get_rng_state()
        super().__exit__(*error)

    def raw_state(self) -> RawState:
        """Where it is. Cheap, for use once a batch; `encode_state` is not."""
        inner = self._bits.state["state"]
        return self._python, ("MT19937", inner["key"], inner["pos"], 0, 0.0), self._torch

    @classmethod
    def at(cls, state: RawState) -> Stream:
        """The one that gave a state."""
        self = cls(0)
        self._python, (name, key, position, *_), self._torch = state
        self._bits.state = {"bit_generator": name, "state": {"key": key, "pos": position}}
        return self


def drop_spare_normal() -> None:
    """Let NumPy forget the second of two normal draws, as each exchange of its generator does.

    Whether there was one, before a batch for example, must not depend on how the batch is made.
    """
    np.random.mtrand.set_bit_generator(np.random.mtrand.get_bit_generator())


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


@contextmanager
def all_preserved() -> Iterator[None]:
    """Leave every global generator after the block as it was before it; `preserved` is cheaper."""
    outer = rng_state()
    try:
        yield
    finally:
        set_rng_state(outer)


def _plain(number: Any) -> Any:
    return number.item() if isinstance(number, np.generic) else number
