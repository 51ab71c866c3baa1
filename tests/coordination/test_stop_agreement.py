"""All ranks stop at the same tick, and none waits for ever: with threads as ranks."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
from torch.distributed import HashStore

from dream_trainer.coordination.agreement import StopAgreement, StopRequest

SIZE = 4
STOP = StopRequest("stop", "enough")


class Ranks:
    """Threads that train in step: a barrier in every batch is the collective that binds them."""

    def __init__(self, asks: Callable[[int, int], bool], seed: int) -> None:
        store = HashStore()
        self.collective = threading.Barrier(SIZE, timeout=20)
        self.agreements = [StopAgreement() for _ in range(SIZE)]
        for rank, agreement in enumerate(self.agreements):
            agreement.connect(store, rank, SIZE)
        self.asks, self.seed = asks, seed
        self.stopped_at: dict[int, list[int]] = {rank: [] for rank in range(SIZE)}
        self.is_over = threading.Event()

    def run(self, num_stops: int = 1) -> None:
        watchers = [threading.Thread(target=self._watch, args=(one,)) for one in self.agreements]
        ranks = [threading.Thread(target=self._train, args=(r, num_stops)) for r in range(SIZE)]
        for thread in [*watchers, *ranks]:
            thread.start()
        for thread in ranks:
            thread.join()
        self.is_over.set()
        for thread in watchers:
            thread.join()

    def _watch(self, agreement: StopAgreement) -> None:
        while not self.is_over.wait(0.001):
            agreement.look()

    def _train(self, rank: int, num_stops: int) -> None:
        draw = random.Random(self.seed * SIZE + rank)
        batch = 0
        while len(self.stopped_at[rank]) < num_stops:
            for _ in range(draw.randrange(2000)):
                pass  # ranks are not equally fast
            if self.asks(rank, batch):
                self.agreements[rank].ask(STOP)
            self.collective.wait()
            if self.asks(rank, batch + 1000):
                self.agreements[rank].ask(STOP)
            if self.agreements[rank].tick() is not None:
                self.stopped_at[rank].append(batch)
            batch += 1


@pytest.mark.parametrize("place", ["before the collective", "after it"])
@pytest.mark.parametrize("asking", [(0,), (2,), (1, 3), (0, 1, 2, 3)], ids=str)
def test_all_stop_at_one_tick(asking: tuple[int, ...], place: str) -> None:
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    offset = 0 if place == "before the collective" else 1000
    for number in range(10):
        ranks = Ranks(lambda rank, at: rank in asking and at == 5 + offset, seed + number)
        ranks.run()
        places = {tuple(stopped) for stopped in ranks.stopped_at.values()}
        assert len(places) == 1, ranks.stopped_at
        ((stopped,),) = places
        # A rank is at most one batch ahead: the collective binds it.
        assert stopped == 5 if len(asking) == SIZE else stopped in (5, 6)


def test_one_stop_follows_another() -> None:
    ranks = Ranks(lambda rank, at: (rank, at) in {(1, 3), (2, 9), (0, 20)}, seed=1)
    ranks.run(num_stops=3)
    places = {tuple(stopped) for stopped in ranks.stopped_at.values()}
    assert len(places) == 1
    assert [3 <= at <= 4 for at in places.pop()[:1]] == [True]


def test_alone_a_request_is_due_at_the_next_tick() -> None:
    agreement = StopAgreement()
    agreement.ask(STOP)  # before anything is connected
    assert agreement.tick() is None
    agreement.connect()
    assert agreement.tick() == STOP
    assert agreement.tick() is None


class SlowStore:
    """Answers the first request only when the round that it belongs to is over."""

    def __init__(self, store: HashStore, meanwhile: Callable[[], None]) -> None:
        self.store, self.meanwhile = store, meanwhile

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        answer: bytes = self.store.compare_set(key, expected, desired)
        meanwhile, self.meanwhile = self.meanwhile, lambda: None
        meanwhile()
        return answer


def test_a_request_that_comes_too_late_for_its_round_is_heard_in_the_next() -> None:
    store = HashStore()
    other, asking = (StopAgreement(lambda: pytest.fail("it waits for ever")) for _ in range(2))

    def end_the_round() -> None:
        for _ in range(3):
            other.look()
            asking.look()
        assert asking.tick() == other.tick() == STOP

    other.connect(store, 0, 2)
    asking.connect(SlowStore(store, end_the_round), 1, 2)  # type: ignore[arg-type]
    other.ask(STOP)
    asking.ask(StopRequest("preempt", "SIGTERM"))
    for _ in range(3):
        other.look()
        asking.look()
    assert asking.tick() == other.tick() == StopRequest("preempt", "SIGTERM")
