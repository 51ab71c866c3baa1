"""Process groups of workers that torchrun starts again and again."""

from __future__ import annotations

import itertools
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import DistError, TCPStore

_KEY = "dream_trainer/store/{}"
_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE")
_SECONDS = 300.0
_TRY = timedelta(seconds=2)
#: Groups of this process, as on every other rank: a rank that is ahead with its next group would
#: find the store of the last one, which rank 0 is about to close.
_numbers = itertools.count()


def _agent_store() -> TCPStore | None:
    """The store of the torchrun agents, which outlives their workers; None without them."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or not dist.is_available():
        return None
    if dist.is_initialized():  # nobody will open another one
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(address, port, is_master=False, timeout=timedelta(seconds=_SECONDS))


@contextmanager
def fresh_store() -> Iterator[None]:
    """In the block, ``env://`` meets in a store that no earlier attempt of the job has used.

    torch lets all attempts of a torchrun job share the agents' store. Workers that were started
    again find the addresses of dead ones there, and wait for them until they time out.

    Raises:
        RuntimeError: rank 0 did not come.
    """
    agents = _agent_store()
    if agents is None:
        yield
        return
    before = {name: os.environ[name] for name in _VARIABLES}
    address, key = before["MASTER_ADDR"], _KEY.format(next(_numbers))
    if os.environ["RANK"] == "0":
        # It must live until torch has opened its own on the same port.
        store, port = _open(agents, address, key)
    else:
        store, port = _find(agents, address, key)
    os.environ |= {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "False"}
    try:
        yield
    finally:
        os.environ |= before
        del store


def _open(agents: TCPStore, address: str, key: str) -> tuple[TCPStore, int]:
    store = TCPStore(address, 0, is_master=True, wait_for_workers=False, multi_tenant=True)
    token = secrets.token_hex(8)
    store.set(key, token)
    agents.set(key, f"{store.port} {token}")
    return store, store.port


def _find(agents: TCPStore, address: str, key: str) -> tuple[TCPStore, int]:
    # What is written there may be of an earlier attempt, and another program's port by now.
    deadline = time.monotonic() + _SECONDS
    while time.monotonic() < deadline:
        port, token = agents.get(key).decode().split()
        try:
            store = TCPStore(address, int(port), is_master=False, timeout=_TRY)
            if store.check([key]) and store.get(key).decode() == token:
                return store, int(port)
        except (DistError, RuntimeError):
            time.sleep(0.05)
    raise RuntimeError(f"rank 0 has not opened its store on {address} within {_SECONDS:.0f} s")


__all__ = ["fresh_store"]
