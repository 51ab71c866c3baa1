"""Two collectives over plain Python objects; on one process they cost nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")
#: A process group; None is the default one.
Group = Any


def on_rank_zero(function: Callable[[], T], rank: int, world_size: int, group: Group = None) -> T:
    """Run on rank 0 and hand its result, or its exception, to every rank.

    Ranks that looked at the disk on their own could see different things, and then wait for
    each other for ever.
    """
    if world_size == 1:
        return function()
    outcome: Any = None
    if rank == 0:
        try:
            outcome = (function(), None)
        except Exception as error:  # noqa: BLE001 - the other ranks must get it, whatever it is
            outcome = (None, error)
    box = [outcome]
    dist.broadcast_object_list(box, src=0, group=group)
    result, failure = box[0]
    if failure is not None:
        raise failure
    return result  # type: ignore[no-any-return]


def all_gather(value: T, world_size: int, group: Group = None) -> list[T]:
    """The value of every rank, in rank order."""
    if world_size == 1:
        return [value]
    values: list[Any] = [None] * world_size
    dist.all_gather_object(values, value, group=group)
    return values
