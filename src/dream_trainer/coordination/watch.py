"""RankWatch: a thread that sees when another rank fails, and ends this one in time."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from dream_trainer.coordination.agreement import StopAgreement
from dream_trainer.coordination.failure import RankFailedError, RankFailure, is_left_alone
from dream_trainer.coordination.messages import end_process, tell
from dream_trainer.coordination.place import Place, SharedPlace, forget
from dream_trainer.errors import ProblemsError

if TYPE_CHECKING:
    from dream_trainer.world import DreamWorld

_SECONDS_BETWEEN_LOOKS = 0.5
_SECONDS_WHILE_PENDING = 0.02
# The store answers tens of thousands of requests a second; a look makes about five.
_MOST_LOOKS_PER_SECOND = 2000
_SECONDS_TO_END = 5.0
_SECONDS_TO_DIE = 0.2
_FAILURE, _SEEN, _LEFT = "failure", "seen", "left"


@dataclass(frozen=True)
class _Peer:
    """How another rank is found on its machine."""

    machine: str
    pid: int
    started: str
    place: str


class RankWatch:
    """Keeps an eye on the other ranks while a run is under way.

    Every rank tells a store that it is alive. A rank that raises tells its error there; one
    whose process is gone is noticed by the ranks of its machine at once; one that has not been
    heard of for ``timeout`` seconds, frozen or cut off, by rank 0. Then every rank prints which
    one failed first, where and how, and ends: by the exception that its collective raises, or
    after five seconds, because a collective can wait for ever, with exit status 1.

    Args:
        place: where this rank is.
        agreement: served by the same thread.
        timeout: seconds without a sign of life after which a rank counts as failed.
        clock: seconds from any start.
    """

    def __init__(
        self,
        place: Place,
        agreement: StopAgreement,
        timeout: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._place, self._agreement = place, agreement
        self._timeout, self._clock = timeout, clock
        self._thread: threading.Thread | None = None
        self._wake, self._leaving = threading.Event(), threading.Event()
        self._lock = threading.Lock()
        self.failure: RankFailure | None = None
        self._is_failure_known = threading.Event()

    # ------------------------------------------------------------------ main thread

    def join(self, world: DreamWorld) -> None:
        """Begin to watch. A collective; nothing happens on one process, or when it is begun.

        Args:
            world: launched.
        """
        if self._thread is not None:
            return
        if world.size == 1:
            if not self._agreement.is_connected:
                self._agreement.connect()
            return
        self._rank, self._size = world.rank, world.size
        self._store = _open_store(world, self._timeout)
        path = Path()  # a full disk for temporary files is no reason not to train
        with suppress(OSError):
            path = self._place.share()
        mine = _Peer(_machine(), os.getpid(), _start_of(os.getpid()), str(path))
        peers = world.all_gather_object(mine)
        self._neighbours = {
            rank: peer
            for rank, peer in enumerate(peers)
            if peer.machine == mine.machine and rank != self._rank
        }
        self._places = {}
        for rank, peer in self._neighbours.items():
            with suppress(OSError, ValueError):
                self._places[rank] = SharedPlace(peer.place)
        world.barrier()  # all of them are open
        world.hold_children()
        forget(path)
        self._beats: dict[int, tuple[bytes, float]] = {}
        self._num_beats, self._last_look = 0, self._clock()
        self._answered_at = self._last_look
        self._leaving.clear()
        self.failure = None
        self._is_failure_known.clear()
        self._agreement.connect(self._store, self._rank, self._size)
        self._thread = threading.Thread(target=self._run, name="rank watch", daemon=True)
        self._guard = threading.Thread(target=self._guard_store, name="rank guard", daemon=True)
        self._thread.start()
        self._guard.start()

    def leave(self) -> None:
        """End the watch: this rank goes its own way. Rank 0 waits for the others to leave."""
        if self._thread is None:
            self._agreement.disconnect()
            return
        others = range(1, self._size) if self._rank == 0 else ()
        if others:
            # Rank 0 carries the store: gone too early, it would look like a failure. The others'
            # ends may take their time; the thread still watches.
            left = [f"{_LEFT}/{rank}" for rank in others]
            with suppress(dist.DistError):
                while self.failure is None and not self._store.check(left):
                    self._is_failure_known.wait(_SECONDS_WHILE_PENDING)
        self._leaving.set()
        self._wake.set()
        self._guard.join()
        while self._thread.is_alive() and not self._is_store_silent:
            self._thread.join(_SECONDS_WHILE_PENDING)
        # Not before: rank 0 has passed its last place to stop, and another may just be asked to.
        self._agreement.disconnect()
        if self._thread.is_alive():
            self._note(self._frozen(0))  # the thread may wait for the store for ever
        else:
            with suppress(dist.DistError):
                self._store.set(f"{_LEFT}/{self._rank}", "1")
                if self.failure is not None:
                    keys = [f"{_SEEN}/{rank}" for rank in others if rank != self.failure.rank]
                    self._store.wait(keys, timedelta(seconds=_SECONDS_TO_END))
        self._thread = None
        for place in self._places.values():
            place.close()
        self._place.keep()
        del self._store

    def fail(self, error: BaseException) -> RankFailure | None:
        """Tell the others about an exception that ends this rank.

        Returns:
            The failure of another rank, if this one is only its consequence.
        """
        if self._thread is None:
            return None
        text = f"{type(error).__name__}: {error}".strip(": ")
        mine = RankFailure(self._rank, text, str(self._place))
        if is_left_alone(error):
            # Who was first is seen by the thread: in a moment, or when the silence has lasted.
            # A process that dies closes its connections before it counts as dead.
            self._is_failure_known.wait(_SECONDS_TO_DIE)
            self._wake.set()
            self._is_failure_known.wait(self._timeout + 2 * self._seconds_between_looks())
            if self.failure is not None:
                return self.failure
        # It says itself what is wrong with a configuration, in its own two lines.
        self._tell(mine, is_news=not isinstance(error, ProblemsError))
        return None

    def look_now(self) -> bool:
        """Look at once. From any thread.

        Returns:
            Whether a rank has failed.
        """
        if self._thread is not None and self.failure is None:
            with suppress(dist.DistError):
                self._look_for_failures()
        return self.failure is not None

    def require_all(self) -> None:
        """Raise if a rank has failed.

        Raises:
            RankFailedError: naming the first one.
        """
        if self.failure is not None:
            raise RankFailedError(self.failure)

    # ------------------------------------------------------------------ the thread

    def _run(self) -> None:
        while not self._leaving.is_set() and self.failure is None:
            try:
                self._look()
                self._answered_at = self._clock()
            except RuntimeError as error:  # of torch 2.6's store not always a DistError
                if not self._leaving.is_set():
                    what = f"the store that it carries is gone ({str(error).splitlines()[0]})"
                    self._note(RankFailure(0, what, self._place_of(0)))
            self._wake.wait(self._seconds_between_looks())
            self._wake.clear()
        if self.failure is not None:
            with suppress(dist.DistError):
                self._store.set(f"{_SEEN}/{self._rank}", "1")

    def _seconds_between_looks(self) -> float:
        return seconds_between_looks(self._size, self._timeout, self._agreement.is_pending)

    def _guard_store(self) -> None:
        """The store freezes with rank 0, and with it the thread that asks it."""
        last = self._clock()
        while not self._leaving.wait(_SECONDS_BETWEEN_LOOKS):
            now = self._clock()
            if now - last > self._timeout / 2:
                self._answered_at = now  # this process was stopped itself
            last = now
            if self._is_store_silent:
                self._note(self._frozen(0))
            if self.failure is not None:
                self._end()

    @property
    def _is_store_silent(self) -> bool:
        return self._clock() - self._answered_at > self._timeout

    def _look(self) -> None:
        now = self._clock()
        if now - self._last_look > self._timeout / 2:
            # This process was stopped itself (Ctrl-Z, say): what it has not seen proves nothing.
            self._beats = {rank: (beat, now) for rank, (beat, _) in self._beats.items()}
        self._last_look = now
        self._num_beats += 1
        self._look_for_failures()
        self._store.set(f"beat/{self._rank}", f"{self._num_beats} {self._place}")
        if self.failure is not None:
            return
        if (silent := self._silent_rank(now)) is not None:
            self._tell(silent)
            return
        self._agreement.look()

    def _look_for_failures(self) -> None:
        # First at the processes: a store that went with rank 0 has nothing to tell.
        if (gone := self._gone_neighbour()) is not None:
            self._note(gone) if gone.rank == 0 else self._tell(gone)
        elif self._store.check([_FAILURE]):
            self._note(RankFailure.from_json(self._store.get(_FAILURE)))

    def _gone_neighbour(self) -> RankFailure | None:
        for rank, peer in self._neighbours.items():
            if _start_of(peer.pid) == peer.started:
                continue
            # It may have ended well, or have told its error, between two looks.
            if rank != 0 and self._store.check([f"{_LEFT}/{rank}"]):
                continue
            if rank != 0 and self._store.check([_FAILURE]):
                continue
            return RankFailure(rank, "its process is gone", self._place_of(rank))
        return None

    def _silent_rank(self, now: float) -> RankFailure | None:
        """Rank 0 looks at everybody, the others at rank 0 alone: 2 messages per rank and look."""
        watched = range(1, self._size) if self._rank == 0 else (0,)
        keys = {rank: f"beat/{rank}" for rank in watched}
        if not self._store.check(list(keys.values())):
            return None  # somebody's first one is still to come; its start was a collective
        for rank, beat in zip(keys, self._store.multi_get(list(keys.values())), strict=True):
            before = self._beats.get(rank)
            if before is None or before[0] != beat:
                self._beats[rank] = (beat, now)
            elif now - before[1] > self._timeout and not self._store.check([f"{_LEFT}/{rank}"]):
                return self._frozen(rank)
        return None

    def _frozen(self, rank: int) -> RankFailure:
        what = f"it has not answered for {self._timeout:g} s"
        return RankFailure(rank, what, self._place_of(rank), is_frozen=True)

    def _place_of(self, rank: int) -> str:
        """Where a rank is; on another machine, where it was when it was heard of last."""
        if rank in self._places:
            return str(self._places[rank])
        beat, _ = self._beats.get(rank, (b"", 0.0))
        return beat.decode().partition(" ")[2] or "an unknown place"

    def _tell(self, failure: RankFailure, *, is_news: bool = True) -> None:
        """Let it be the first one, unless there is one already."""
        is_mine, first = failure.rank == self._rank, failure
        with suppress(dist.DistError):
            first = RankFailure.from_json(self._store.compare_set(_FAILURE, "", failure.to_json()))
        # Who raises an error of its own, later than another rank, has no need of the line.
        self._note(first, is_news=is_news and (not is_mine or first.rank == self._rank))

    def _note(self, failure: RankFailure, *, is_news: bool = True) -> None:
        with self._lock:
            if self.failure is not None:
                return
            self.failure = failure
            if is_news:
                # The first line that anybody prints: what the others say is a consequence.
                tell(failure)
        self._is_failure_known.set()
        peer = self._neighbours.get(failure.rank)
        if failure.is_frozen and peer is not None and _start_of(peer.pid) == peer.started:
            # It would keep its device, and its launcher waiting.
            with suppress(OSError):
                os.kill(peer.pid, signal.SIGKILL)

    def _end(self) -> None:
        """Give the main thread time to end by itself, then end the process."""
        assert self.failure is not None
        is_mine = self.failure.rank == self._rank
        deadline = self._clock() + (self._timeout if is_mine else _SECONDS_TO_END)
        if not self._leaving.wait(deadline - self._clock()):
            end_process(1)


def seconds_between_looks(size: int, timeout: float, is_pending: bool) -> float:
    """How long a rank waits before it asks the store again; more ranks ask less often.

    Args:
        size: number of ranks.
        timeout: seconds of silence after which a rank counts as failed.
        is_pending: whether the ranks are about to agree on a place to stop.
    """
    least = size / _MOST_LOOKS_PER_SECOND
    if is_pending:
        return max(_SECONDS_WHILE_PENDING, least)
    return max(_SECONDS_BETWEEN_LOOKS, min(least, timeout / 8))


def _open_store(world: DreamWorld, timeout: float) -> dist.Store:
    """A store of the run's own. A collective.

    Not the one of the process group: under some launchers that outlives a restart, and it may be
    carried by another process than rank 0.
    """
    seconds = timedelta(seconds=timeout)
    store: dist.TCPStore | None = None
    if world.rank == 0:
        # Any free port.
        store = dist.TCPStore("localhost", 0, None, True, seconds, wait_for_workers=False)
    host = os.environ.get("MASTER_ADDR") or socket.gethostname()
    address = world.broadcast((host, 0 if store is None else store.port))
    if store is None:
        store = dist.TCPStore(*address, None, False, seconds, wait_for_workers=False)
    return store


def _machine() -> str:
    """The same for two processes that can see each other's process numbers."""
    with suppress(OSError):
        # Many machines have one name ("localhost"), and the first namespace one number on all.
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"  # noqa: PTH116
    return socket.gethostname()


def _start_of(pid: int) -> str:
    """When a process started; empty if it is gone, or dead and not collected."""
    try:
        # The name in parentheses may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):  # gone before, or while it was read
        if Path("/proc/self").exists():
            return ""
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return ""
        return "unknown"
    return "" if fields[0] in "ZX" else fields[19]
