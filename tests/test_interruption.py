"""A signal ends the batch under way first; what is then saved goes on to the same end."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from support import TinyTrainer, differences, exact_state, run_ranks, tiny

from dream_trainer.callbacks import Callback
from dream_trainer.checkpointing import CheckpointStore
from dream_trainer.coordination import Interrupted, Preempted, signals

# A run seeds the global streams.
pytestmark = pytest.mark.may_leave("rng")

OPTIONS: dict[str, Any] = {"n_epochs": 2, "gradient_accumulation_steps": 3, "dropout": 0.2}
OPTIONS |= {"every_n_epochs": None, "num_samples": 32}


@pytest.fixture(autouse=True)
def default_handlers() -> Iterator[None]:
    """A shell starts what runs in its background with Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Signals(Callback):
    """Sends itself a signal in the middle of a batch, on one rank."""

    def __init__(self, at_batch: int, number: int = signal.SIGINT, rank: int = 0) -> None:
        self.at_batch, self.number, self.rank = at_batch, number, rank

    def pre_train_step(self, trainer: Any, batch: Any, batch_idx: int) -> None:
        if trainer.progress.num_batches == self.at_batch and trainer.world.rank == self.rank:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
# In a window, at its end, at that of an epoch, at that of the run.
@pytest.mark.parametrize("at_batch", [1, 2, 7, 15])
def test_the_batch_ends_and_is_saved(
    tmp_path: Path, at_batch: int, number: int, capfd: pytest.CaptureFixture[str]
) -> None:
    handlers = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    straight = tiny(tmp_path, experiment="straight", **OPTIONS)
    straight.fit()
    cut = tiny(tmp_path, experiment="cut", callbacks={"s": Signals(at_batch, number)}, **OPTIONS)
    with pytest.raises(Interrupted if number == signal.SIGINT else Preempted) as caught:
        cut.fit()
    assert number == signal.SIGINT or caught.value.code == 143
    assert cut.progress.num_batches == at_batch + 1
    assert "stopping after this batch" in capfd.readouterr().err
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == handlers
    resumed = tiny(tmp_path, experiment="cut", **OPTIONS)
    resumed.fit()
    assert resumed.local_batches == straight.local_batches - at_batch - 1
    assert differences(exact_state(straight), exact_state(resumed)) == []
    logs = [(t.run_directory / "metrics.jsonl").read_bytes() for t in (straight, resumed)]
    assert logs[0] == logs[1]


class SignalsGroup(Callback):
    """As a scheduler does: the workers get it, too."""

    def pre_train_step(self, trainer: Any, batch: Any, batch_idx: int) -> None:
        if trainer.progress.num_batches == 4:
            for child in psutil.Process().children():
                child.terminate()
                child.send_signal(signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGTERM)


def test_workers_that_get_the_signal_too_do_not_end_the_batch(tmp_path: Path) -> None:
    callbacks = {"signals": SignalsGroup()}
    trainer = tiny(tmp_path, callbacks=callbacks, num_workers=2, **OPTIONS)
    with pytest.raises(Preempted):
        trainer.fit()
    assert trainer.checkpointer.store.list()[-1].manifest.step == trainer.global_step


class Twice(Signals):
    def post_train_step(self, trainer: Any, *arguments: Any) -> None:
        if trainer.progress.num_batches == self.at_batch + 1:
            os.kill(os.getpid(), self.number)


def test_a_second_one_acts_at_once_and_saves_nothing(tmp_path: Path) -> None:
    trainer = tiny(tmp_path, callbacks={"twice": Twice(4)}, **OPTIONS)
    with pytest.raises(KeyboardInterrupt) as caught:
        trainer.fit()
    assert caught.type is KeyboardInterrupt
    assert trainer.checkpointer.store.paths() == []


def test_saving_can_be_switched_off(tmp_path: Path) -> None:
    trainer = tiny(tmp_path, callbacks={"s": Signals(4)}, on_interrupt=False, **OPTIONS)
    with pytest.raises(Interrupted):
        trainer.fit()
    assert trainer.checkpointer.store.paths() == []


def test_a_handler_of_the_programs_own_is_left_alone(tmp_path: Path) -> None:
    calls = []
    before = signal.signal(signal.SIGINT, lambda *_: calls.append("own"))
    try:
        tiny(tmp_path, callbacks={"s": Signals(4)}, **OPTIONS).fit()
    finally:
        signal.signal(signal.SIGINT, before)
    assert calls == ["own"]


@pytest.mark.distributed
def test_a_signal_to_one_rank_stops_all_after_the_same_batch(tmp_path: Path) -> None:
    def rank(name: str, at_batch: int | None) -> Any:
        callbacks = {} if at_batch is None else {"s": Signals(at_batch, signal.SIGTERM, rank=1)}
        trainer = tiny(tmp_path, TinyTrainer, experiment=name, callbacks=callbacks, **OPTIONS)
        try:
            trainer.fit()
        except Preempted:
            return trainer.progress.num_batches
        return exact_state(trainer)

    straight = run_ranks(2, rank, "straight", None)
    stopped = run_ranks(2, rank, "cut", 1)
    assert stopped[0] == stopped[1] < 8
    store = CheckpointStore(tmp_path / "default" / "default" / "cut" / "checkpoints")
    assert len(store.list()) == 1
    resumed = run_ranks(2, rank, "cut", None)
    assert [differences(*pair) for pair in zip(straight, resumed, strict=True)] == [[], []]


class SignalsEarly(Callback):
    """Gets a signal before anything is launched."""

    def pre_launch(self, trainer: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        trainer.interruption._signals.settle()  # heard of, as after a moment


def test_a_signal_before_the_launch_ends_the_run(tmp_path: Path) -> None:
    trainer = tiny(tmp_path, callbacks={"early": SignalsEarly()}, **OPTIONS)
    with pytest.raises(Preempted):
        trainer.fit()
    assert trainer.progress.num_batches == 0


@pytest.mark.parametrize(("launched", "expired"), [(True, []), (False, [130])])
def test_one_ctrl_c_that_comes_twice_leaves_time_to_save(
    launched: bool, expired: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signals, "_SECONDS_TO_UNWIND", 0.05)
    if launched:  # from the terminal, and from the launcher
        monkeypatch.setenv("LOCAL_RANK", "0")
    statuses: list[int] = []
    with (
        contextlib.suppress(KeyboardInterrupt),
        signals.SignalWatch([], lambda number: None, statuses.append) as watch,
    ):
        os.kill(os.getpid(), signal.SIGINT)
        watch.settle()
        try:
            os.kill(os.getpid(), signal.SIGINT)
        finally:
            time.sleep(0.2)
    assert statuses == expired
