"""If a rank raises, is killed or freezes, all ranks end soon, and say which one it was."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ending_ranks import run_to_the_end
from support import TinyTrainer, tiny
from torch.utils.data import DataLoader

from dream_trainer.callbacks import Callback
from dream_trainer.configs import DeviceParameters
from dream_trainer.coordination import watch

pytestmark = pytest.mark.distributed


def strike(how: str) -> None:
    """What happens to the rank that fails."""
    if how == "raise":
        raise ValueError("boom")
    os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGSTOP)


class FailingPoints(torch.utils.data.Dataset[Any]):
    """Strikes when the fifth sample is asked for."""

    def __init__(self, dataset: Any, how: str) -> None:
        self.dataset, self.how, self.num_read = dataset, how, 0

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        self.num_read += 1
        if self.num_read == 5:
            strike(self.how)
        return self.dataset[index]


class Fails(TinyTrainer):
    """Rank 1 (or ``RANK_THAT_FAILS``) comes to its end in a phase, at the second step."""

    phase, how, failing_rank = "", "", 1

    def _is_here(self, phase: str) -> bool:
        is_here = (phase, self.world.rank) == (self.phase, self.failing_rank)
        return is_here and self.progress.num_batches >= 1

    def configure_dataloaders(self) -> Any:
        train, val = super().configure_dataloaders()
        if (self.phase, self.world.rank) == ("loader", self.failing_rank):
            train = DataLoader(FailingPoints(train.dataset, self.how), batch_size=2, shuffle=True)
        return train, val

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self._is_here("training_step"):
            strike(self.how)
        loss = self.compute_loss(batch, batch_idx)
        if self._is_here("backward"):
            loss.register_hook(lambda _: strike(self.how))
        self.backward(loss)
        self.step()
        return {"loss": loss}

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        if self._is_here("validation"):
            strike(self.how)
        return super().validation_step(batch, batch_idx)


class StrikesInSave(Callback):
    """Comes before the checkpoint callback: the others are in the collectives of the save."""

    def on_boundary(self, trainer: Any) -> None:
        if trainer._is_here("save"):
            strike(trainer.how)


def train(root: Path, phase: str, how: str, failing_rank: int, **options: Any) -> None:
    kind = type("Kind", (Fails,), {"phase": phase, "how": how, "failing_rank": failing_rank})
    trainer = tiny(
        root,
        kind,
        devices=2,
        batch_size=2,
        every_n_steps=1,
        callbacks={"strikes": StrikesInSave()},
        val_every_n_steps=2,
        # Short where it is waited for; elsewhere a busy machine must not look like a frozen rank.
        **{"failure_timeout_seconds": 2.0 if how == "freeze" else 20.0} | options,
    )
    trainer.fit()


PHASES = ["training_step", "backward", "save", "validation", "loader"]
# A freeze takes its three seconds; rank 0 carries the store, so that it is a case of its own.
CASES = [
    pytest.param(
        *(phase, how, rank),
        marks=[pytest.mark.faults] * (how == "freeze" and rank == 0 and phase != "backward"),
        id=f"{phase}-{how}-{rank}",
    )
    for phase in PHASES
    for how in ("raise", "kill", "freeze")
    for rank in (0, 1)
]


@pytest.mark.parametrize(("phase", "how", "failing_rank"), CASES)
def test_all_ranks_end_and_the_first_line_tells_why(
    tmp_path: Path, phase: str, how: str, failing_rank: int
) -> None:
    ended = run_to_the_end(tmp_path, 2, train, tmp_path, phase, how, failing_rank)
    first = ended.lines[0]
    assert first.startswith(f"rank {failing_rank} failed first, in {phase}, step "), ended
    what = {"raise": "ValueError: boom", "kill": "process is gone", "freeze": "not answered"}
    assert what[how] in first
    assert all(ended.statuses), ended
    assert ended.seconds < 15


def with_defaults(*arguments: Any) -> None:
    default = DeviceParameters().failure_timeout_seconds
    train(*arguments, failure_timeout_seconds=default)


@pytest.mark.faults
def test_by_default_all_ranks_end_within_thirty_seconds(tmp_path: Path) -> None:
    ended = run_to_the_end(tmp_path, 2, with_defaults, tmp_path, "backward", "freeze", 1)
    assert all(ended.statuses)
    assert "it has not answered for 20 s" in ended.lines[0]
    assert ended.seconds < 30


class AtTheEnd(Callback):
    """Freezes a rank in ``close``, after the last collective, or lets it take its time there."""

    def __init__(self, rank: int, seconds: float | None) -> None:
        self.rank, self.seconds = rank, seconds

    def close(self, trainer: Any) -> None:
        if trainer.world.rank != self.rank:
            time.sleep(0 if self.seconds else 0.7)  # a look at the store is under way
        elif self.seconds:
            time.sleep(self.seconds)
        else:
            strike("freeze")


def train_to_the_end(root: Path, failing_rank: int, seconds: float | None) -> None:
    callbacks = {"end": AtTheEnd(failing_rank, seconds)}
    tiny(root, n_epochs=1, callbacks=callbacks, failure_timeout_seconds=2.0).fit()


@pytest.mark.parametrize("failing_rank", [0, pytest.param(1, marks=pytest.mark.faults)])
def test_a_rank_that_freezes_at_the_very_end_is_named(tmp_path: Path, failing_rank: int) -> None:
    ended = run_to_the_end(tmp_path, 2, train_to_the_end, tmp_path, failing_rank, None)
    line = next(line for line in ended.lines if "failed first" in line)
    assert line.startswith(f"rank {failing_rank} failed first, in end, step "), ended
    assert all(ended.statuses), ended


def test_a_rank_that_takes_its_time_at_the_end_is_waited_for(tmp_path: Path) -> None:
    ended = run_to_the_end(tmp_path, 2, train_to_the_end, tmp_path, 1, 3.0)
    assert ended.statuses == [0, 0], ended
    assert not [line for line in ended.lines if "failed" in line]


class FailsInTheEnd(Callback):
    """Is preempted, and then raises on one rank alone; the other one is in a save by then."""

    def pre_train_step(self, trainer: Any, batch: Any, batch_idx: int) -> None:
        if trainer.world.rank == 0 and batch_idx == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_interrupt(self, trainer: Any) -> None:
        if trainer.world.rank == 1:
            strike("raise")


def be_preempted(root: Path) -> None:
    tiny(root, devices=2, batch_size=2, callbacks={"fails": FailsInTheEnd()}).fit()


def test_a_rank_that_raises_on_its_way_out_is_named(tmp_path: Path) -> None:
    ended = run_to_the_end(tmp_path, 2, be_preempted, tmp_path)
    failures = [line for line in ended.lines if "failed first" in line]
    assert failures[0].startswith("rank 1 failed first, in "), ended
    assert "ValueError: boom" in failures[0]
    assert all(ended.statuses), ended


def test_processes_that_end_while_they_are_looked_at_are_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def read_text(path: Path) -> str:
        raise ProcessLookupError(3, "No such process")

    monkeypatch.setattr(Path, "read_text", read_text)
    assert watch._start_of(os.getpid()) == ""


def test_no_room_for_temporary_files_is_no_reason_not_to_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "mkstemp", full)
    assert run_to_the_end(tmp_path, 2, train, tmp_path, "", "", 1).statuses == [0, 0]


@pytest.mark.parametrize(("size", "expected"), [(2, 0.5), (1000, 0.5), (4096, 2.048)])
def test_thousands_of_ranks_leave_their_store_time_to_answer(size: int, expected: float) -> None:
    assert watch.seconds_between_looks(size, 20.0, is_pending=False) == expected
    # Often enough for a silence to be noticed in time, and one to be told from a pause.
    assert watch.seconds_between_looks(10 * size, 20.0, is_pending=False) <= 20 / 8
    assert watch.seconds_between_looks(2, 20.0, is_pending=True) < 0.1
