"""GarbageCollection: at chosen steps, at no other time, and given back."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support import run_ranks, tiny

from dream_trainer import Callback, GarbageCollection
from dream_trainer.coordination import Interrupted
from dream_trainer.errors import ConfigError


class Watching(Callback):
    """Writes down the steps after which a collection began, and of which generation."""

    def __init__(self) -> None:
        self.step = -1
        self.found: list[tuple[int, int]] = []

    def pre_train_step(self, trainer: Any, batch: Any, batch_idx: int) -> None:
        self.step = trainer.global_step
        for _ in range(2000):  # enough for Python to collect on its own
            cycle: list[Any] = []
            cycle.append(cycle)

    def post_train_step(self, trainer: Any, result: Any, batch: Any, batch_idx: int) -> None:
        self.step = trainer.global_step

    def post_fit(self, trainer: Any) -> None:
        self.step = -1

    def note(self, phase: str, told: dict[str, Any]) -> None:
        if phase == "start" and self.step >= 0:
            self.found.append((self.step, told["generation"]))


@contextmanager
def watching() -> Iterator[Watching]:
    one = Watching()
    gc.callbacks.append(one.note)
    try:
        yield one
    finally:
        gc.callbacks.remove(one.note)


def test_it_collects_at_its_steps_and_python_at_no_other(tmp_path: Path) -> None:
    with watching() as watch:
        callbacks = {"gc": GarbageCollection(every_n_steps=5, generation=2), "watch": watch}
        tiny(tmp_path, callbacks=callbacks, enable=False).fit()  # 12 steps
    assert watch.found == [(5, 2), (10, 2)]
    assert gc.isenabled()


@pytest.mark.parametrize("was_enabled", [True, False])
@pytest.mark.parametrize("end", ["well", "failed", "interrupted", "with a failing neighbour"])
def test_the_state_of_the_collector_comes_back(tmp_path: Path, end: str, was_enabled: bool) -> None:
    class Ending(Callback):
        def post_train_step(self, trainer: Any, result: Any, batch: Any, batch_idx: int) -> None:
            assert not gc.isenabled()
            if end == "failed":
                raise ZeroDivisionError
            if end == "interrupted":
                os.kill(os.getpid(), signal.SIGINT)

        def close(self, trainer: Any) -> None:
            if end == "with a failing neighbour":
                raise ZeroDivisionError

    gc.enable() if was_enabled else gc.disable()
    try:
        trainer = tiny(tmp_path, callbacks={"ending": Ending(), "gc": GarbageCollection()})
        if end == "failed":
            with pytest.raises(ZeroDivisionError):
                trainer.fit()
        elif end == "interrupted":
            with pytest.raises(Interrupted):
                trainer.fit()
        elif end == "well":
            trainer.fit()
        else:
            with pytest.warns(UserWarning, match="while closing: ZeroDivisionError"):
                trainer.fit()
        assert gc.isenabled() is was_enabled
    finally:
        gc.enable()


def collected(root: Path) -> list[tuple[int, int]]:
    with watching() as watch:
        callbacks = {"gc": GarbageCollection(every_n_steps=2), "watch": watch}
        tiny(root, callbacks=callbacks, devices=2, dp_replicate=2, enable=False).fit()  # 6 steps
    return watch.found


@pytest.mark.distributed
def test_all_ranks_collect_after_the_same_steps(tmp_path: Path) -> None:
    assert run_ranks(2, collected, tmp_path) == [[(2, 1), (4, 1), (6, 1)]] * 2


def test_numbers_that_cannot_work_are_told_together() -> None:
    with pytest.raises(ConfigError, match=r"every_n_steps is 0.*\n.*generation is 3"):
        GarbageCollection(every_n_steps=0, generation=3)
