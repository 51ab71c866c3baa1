"""The ranks agree on the moment to stop, without a collective and without waiting in a step."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

import torch.distributed as dist

_SECONDS_BETWEEN_LOOKS = 1.0


@dataclass(frozen=True)
class StopRequest:
    """Why a run is to stop."""

    kind: Literal["stop", "interrupt", "preempt"]
    """``"stop"`` ends the run on purpose, ``"interrupt"`` is Ctrl-C, ``"preempt"`` a scheduler."""
    reason: str
    rank: int = field(default=0, compare=False)
    """Of the one that asked."""


class StopAgreement:
    """Lets all ranks stop at the same tick.

    All ranks count the same ticks, one after each batch for example. When one of them asks for
    a stop, each tells through the store how many ticks it has passed, or is about to pass: its
    thread does, so that a rank that waits in a collective for the others does, too. The largest
    number is the last tick that everybody passes. A rank that gets there early waits; nobody
    waits for it then, since all batches that were begun are finished by all.

    Costs an addition and a comparison a tick; only a request costs more.

    Args:
        require_all: raises if the other ranks cannot be waited for any more.
    """

    def __init__(self, require_all: Callable[[], object] = lambda: None) -> None:
        self._require_all = require_all
        self.on_request: Callable[[StopRequest], None] = lambda request: None
        self._lock = threading.Lock()
        self.is_connected = False
        self._store: dist.Store | None = None
        self._rank, self._size = 0, 1
        self._early: StopRequest | None = None
        self._round = self._num_ticks = 0
        self._begin_round()

    def connect(self, store: dist.Store | None = None, rank: int = 0, size: int = 1) -> None:
        """Begin to pass requests on; those made earlier are passed on now.

        Args:
            store: shared by all ranks, fresh; None for a rank alone.
            rank: of this process.
            size: number of ranks.
        """
        with self._lock:
            self._store, self._rank, self._size = store, rank, size
            self._round = self._num_ticks = 0
            self._begin_round()
            # In one go: a request from another thread comes before all this, or after it.
            self.is_connected = True
            early, self._early = self._early, None
        if early is not None:
            self.ask(early)

    def disconnect(self) -> None:
        """Requests wait for the next `connect`."""
        self.is_connected, self._store, self._early = False, None, None

    def _begin_round(self) -> None:
        self.is_pending = False
        self._request: StopRequest | None = None
        self._last_tick: int | None = None
        self._settled = threading.Event()

    def tick(self) -> StopRequest | None:
        """Count a tick.

        Returns:
            What to stop for, if this is the place: on every rank at the same tick.
        """
        self._num_ticks += 1
        if not self.is_pending:
            return None
        while not self._settled.wait(_SECONDS_BETWEEN_LOOKS):
            self._require_all()
        assert self._last_tick is not None
        if self._num_ticks <= self._last_tick:
            return None
        with self._lock:
            request = self._request
            # Everybody is at this tick: what comes next is another round.
            self._round += 1
            self._begin_round()
        return request

    def ask(self, request: StopRequest) -> bool:
        """Ask all ranks to stop; the first request wins. From any thread of any rank.

        Returns:
            Whether no other rank was first.
        """
        with self._lock:
            request = replace(request, rank=self._rank)
            if not self.is_connected:
                self._early = self._early or request
                return True
            store, number, key = self._store, self._round, self._key("request")
        first = request
        if store is not None:
            try:
                first = _decoded(store.compare_set(key, "", json.dumps(asdict(request))))
            except dist.DistError:
                return True  # rank 0 carries it and does not answer: the watch ends the run
        if not self._note(first, number):
            # Of a round that has ended since, so nobody looks for it there.
            return self.ask(request)
        return first.rank == request.rank

    def look(self) -> None:
        """What the thread does every now and then: hear of requests, answer, decide."""
        store = self._store
        if store is None:
            return
        if not self.is_pending and store.check([self._key("request")]):
            self._note(_decoded(store.get(self._key("request"))), self._round)
        if not self.is_pending or self._settled.is_set():
            return
        last = self._key("last")
        if self._rank == 0 and not store.check([last]):
            told = [self._key(f"ticks/{rank}") for rank in range(self._size)]
            if store.check(told):
                store.set(last, str(max(map(int, store.multi_get(told)))))
        if store.check([last]):
            self._last_tick = int(store.get(last))
            self._settled.set()

    def _note(self, request: StopRequest, number_of_round: int) -> bool:
        """Take a request as that of its round; False if the round is over."""
        with self._lock:
            if number_of_round != self._round:
                return False
            if self._request is not None:
                return True
            self._request = request
            # Before the number is read: a tick that is counted after that sees it, and waits.
            self.is_pending = True
            number = self._num_ticks
            if self._store is None:
                self._last_tick = number
                self._settled.set()
            else:
                self._store.set(self._key(f"ticks/{self._rank}"), str(number))
        self.on_request(request)
        return True

    def _key(self, name: str) -> str:
        return f"stop/{self._round}/{name}"


def _decoded(text: bytes) -> StopRequest:
    return StopRequest(**json.loads(text))
