"""Process groups that this package opens, and ends when their last user has left."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from datetime import timedelta
from typing import Any
from weakref import WeakSet

import torch.distributed as dist

from dream_trainer.world.gloo_threads import let_threads_finish

_LEAVES, _NEXT_PORT = "dream_trainer/leaves", "dream_trainer/next_port"
_PATIENCE = timedelta(seconds=30)


class DefaultGroup:
    """The process group of a process, if one of its users has opened it.

    Trainers that come one after another use the same one: a group in between, with a store and
    a port of its own, would cost a rendezvous each.
    """

    def __init__(self) -> None:
        self._opened: Any = None
        self._users: WeakSet[object] = WeakSet()

    @staticmethod
    def exists() -> bool:
        """Whether there is a default group, of whomever."""
        return dist.is_available() and dist.is_initialized()

    def use(self, user: object, *, is_opened: bool) -> None:
        """Take part in it.

        Args:
            user: until it leaves, or is collected.
            is_opened: whether it was opened for this user.
        """
        self._users.add(user)
        if is_opened:
            self._opened = dist.group.WORLD

    def leave(self, user: object) -> None:
        """Take part no longer; the last one ends the group, unless somebody else opened it.

        On every rank: rank 0 waits half a minute for the others.

        Let go of models first: torch ends a group with Python's lock held when a DDP module is
        the last to use it, and can then wait for ever.
        """
        self._users.discard(user)
        if not self._users and self._opened is not None:
            is_there = self.exists() and dist.group.WORLD is self._opened
            self._opened = None
            if is_there:
                _end_default_group()


def _end_default_group() -> None:
    """End it on this rank, once all ranks have come here, and agree where the next one meets."""
    rank, size = dist.get_rank(), dist.get_world_size()
    store = dist.distributed_c10d._get_default_store()
    with suppress(dist.DistError):
        if rank == 0:
            store.set(_NEXT_PORT, str(_free_port()))
        port = store.get(_NEXT_PORT).decode()
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            # Device meshes keep the store of this group open for ever. On its port the next group
            # would meet the dead addresses of this one there, and wait for them.
            os.environ["MASTER_PORT"] = port
        store.set(f"{_LEAVES}/{rank}", "")
        if rank == 0:
            store.wait([f"{_LEAVES}/{other}" for other in range(size)], _PATIENCE)
    let_threads_finish()
    dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        port: int = free.getsockname()[1]
        return port


DEFAULT_GROUP = DefaultGroup()


class SideGroup:
    """All ranks once more, through gloo, for collectives beside those of the default group.

    Args:
        timeout: of a collective.
    """

    def __init__(self, timeout: timedelta) -> None:
        self._timeout = timeout
        self._group: Any = None

    def open(self) -> Any:
        """The group. The first call makes it, a collective."""
        if self._group is None:
            self._group = dist.new_group(backend="gloo", timeout=self._timeout)
        return self._group

    def end(self) -> None:
        """End its threads; `open` makes another one."""
        group, self._group = self._group, None
        if group is not None and DefaultGroup.exists():
            let_threads_finish()
            dist.destroy_process_group(group)
