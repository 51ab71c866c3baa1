"""Ranks that work on one thing, and collectives over plain Python objects among them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The processes that take part, and which of them this one is. One process by default.

    On one process its collectives cost nothing.
    """

    rank: int = 0
    """Index of this process."""
    size: int = 1
    """Number of processes."""
    group: Any = None
    """Their process group; None is the default one."""

    def on_zero(self, function: Callable[[], T]) -> T:
        """Run on rank 0 and hand its result, or its exception, to every rank.

        Ranks that looked at the disk on their own could see different things, and then wait for
        each other for ever.
        """
        if self.size == 1:
            return function()
        outcome: Any = None
        if self.rank == 0:
            try:
                outcome = (function(), None)
            except Exception as error:  # noqa: BLE001 - the others must get it, whatever it is
                outcome = (None, error)
        box = [outcome]
        dist.broadcast_object_list(box, src=0, group=self.group)
        result, failure = box[0]
        if failure is not None:
            raise failure
        return result  # type: ignore[no-any-return]

    def gather(self, value: T) -> list[T]:
        """The value of every rank, in rank order."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values
