"""Which sizes to try: up by powers of two, then by halves of what is left."""

from __future__ import annotations

from collections.abc import Generator
from typing import Literal

SizeMode = Literal["power", "binsearch"]
#: The search ends once it knows the largest size to so many parts of it.
_PARTS = 16


def sizes_to_try(
    start: int, mode: SizeMode, max_size: int | None
) -> Generator[int, bool, int | None]:
    """Yields a size, is sent whether it fits; returns the largest one that does.

    Args:
        start: the first size. If it does not fit, smaller ones follow.
        mode: ``"power"`` doubles only; ``"binsearch"`` goes on between the last size that fits
            and the first that does not.
        max_size: none is larger; None is without limit.
    """
    size = start if max_size is None else min(start, max_size)
    fits: int | None = None
    too_large: int | None = None
    while size >= 1 and (fits is None or too_large is None):
        if (yield size):
            fits = size
            if size == max_size:
                return fits
            size = size * 2 if max_size is None else min(size * 2, max_size)
            if too_large is not None:
                break
        else:
            too_large = size
            size //= 2
            if fits is not None:
                break
    if fits is None or too_large is None or mode == "power":
        return fits
    while too_large - fits > max(1, fits // _PARTS):
        middle = (fits + too_large) // 2
        if (yield middle):
            fits = middle
        else:
            too_large = middle
    return fits
