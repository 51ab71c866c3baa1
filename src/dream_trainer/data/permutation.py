"""A shuffled order of any length that is computed where it is read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dream_trainer.randomness import derive

_Words = npt.NDArray[np.uint64]
_ROUNDS = 8
#: Places computed together: one by one they would take a hundred times as long.
_BLOCK = 4_096


class Permutation(Sequence[int]):
    """The numbers from 0 to ``length`` - 1, each once, in an order fixed by a seed.

    Takes no memory for the order, and no time to begin anywhere in it. A generalised Feistel
    network over pairs of digits, with cycle walking, as in Black and Rogaway, "Ciphers with
    arbitrary finite domains" (2002); the round function is SplitMix64's.

    Args:
        length: how many.
        seed: each gives another order.
    """

    def __init__(self, length: int, seed: int) -> None:
        self._length = length
        # A number is a pair of digits, (n // b, n % b); the pairs are just more than the numbers.
        self._a = max(1, math.isqrt(max(length - 1, 0)) + 1)
        self._b = max(1, -(-length // self._a))
        self._keys = [np.uint64(derive(seed, round)) for round in range(_ROUNDS)]
        self._block: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, slice):
            index = range(self._length)[key]
            return self._in_block(index // _BLOCK)[index % _BLOCK]
        places = range(self._length)[key]
        if not places:
            return []
        if places.step != 1:
            return [self[place] for place in places]
        first, last = places[0] // _BLOCK, places[-1] // _BLOCK
        found: list[int] = []
        for block in range(first, last + 1):
            start = places[0] - block * _BLOCK if block == first else 0
            stop = places[-1] + 1 - block * _BLOCK if block == last else _BLOCK
            found += self._in_block(block)[start:stop]
        return found

    def _in_block(self, number: int) -> list[int]:
        if self._block[0] != number:
            start = number * _BLOCK
            places = np.arange(start, min(start + _BLOCK, self._length), dtype=np.uint64)
            self._block = number, self._permuted(places).tolist()
        return self._block[1]

    def _permuted(self, numbers: _Words) -> _Words:
        found = self._walk(numbers)
        # The few that fall outside go on until they are inside: a cycle ends where it began.
        while len(outside := np.nonzero(found >= self._length)[0]):
            found[outside] = self._walk(found[outside])
        return found

    def _walk(self, numbers: _Words) -> _Words:
        a, b = np.uint64(self._a), np.uint64(self._b)
        left, right = numbers // b, numbers % b
        for round, key in enumerate(self._keys):
            if round % 2:
                right = (right + _mixed(left ^ key) % b) % b
            else:
                left = (left + _mixed(right ^ key) % a) % a
        joined: _Words = left * b + right
        return joined


def _mixed(words: _Words) -> _Words:
    """SplitMix64's output function (see `dream_trainer.randomness.derive`)."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: _Words = words ^ (words >> np.uint64(31))
    return mixed
