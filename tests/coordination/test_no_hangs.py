"""If a rank raises, is killed or freezes, all ranks end soon, and say which one it was."""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from support import TinyTrainer, free_port, rank_environment, tiny
from torch.utils.data import DataLoader

from dream_trainer.callbacks import Callback
from dream_trainer.coordination import RankFailedError

pytestmark = pytest.mark.distributed

_fork = get_context("fork")
_TIME_LIMIT = 30.0


@dataclass
class Ended:
    """How a run on two ranks ended."""

    statuses: list[int]
    lines: list[str]
    seconds: float


def run_until_the_end(root: Path, function: Any, *arguments: Any) -> Ended:
    """Two forked ranks that write to one stderr; one that is left after 30 s is an error."""
    log, port = root / "stderr.txt", free_port()
    processes = [
        _fork.Process(
            target=_rank, args=(log, rank_environment(rank, 2, port), function, arguments)
        )
        for rank in range(2)
    ]
    started = time.monotonic()
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(max(0, _TIME_LIMIT - (time.monotonic() - started)))
        seconds = time.monotonic() - started
        statuses = [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()
            process.close()
    text = log.read_text()
    assert None not in statuses, f"not ended after {seconds:.0f} s: {statuses}\n{text}"
    return Ended([s for s in statuses if s is not None], text.splitlines(), seconds)


def _rank(log: Path, environment: dict[str, str], function: Any, arguments: Any) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(stream, 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    try:
        function(*arguments)
    except SystemExit as end:
        os._exit(end.code if isinstance(end.code, int) else 1)
    except RankFailedError as error:
        print(f"RankFailedError: {error}", file=sys.stderr)
        os._exit(1)
    except BaseException as error:  # noqa: BLE001 - as the interpreter does at its end
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        os._exit(1)
    os._exit(0)


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


def train(root: Path, phase: str, how: str, failing_rank: int) -> None:
    kind = type("Kind", (Fails,), {"phase": phase, "how": how, "failing_rank": failing_rank})
    trainer = tiny(
        root,
        kind,
        devices=2,
        batch_size=2,
        every_n_steps=1,
        failure_timeout_seconds=2.0,
        callbacks={"strikes": StrikesInSave()},
        val_every_n_steps=2,
    )
    trainer.fit()


@pytest.mark.parametrize("failing_rank", [0, 1])
@pytest.mark.parametrize("how", ["raise", "kill", "freeze"])
@pytest.mark.parametrize("phase", ["training_step", "backward", "save", "validation", "loader"])
def test_all_ranks_end_and_the_first_line_tells_why(
    tmp_path: Path, phase: str, how: str, failing_rank: int
) -> None:
    ended = run_until_the_end(tmp_path, train, tmp_path, phase, how, failing_rank)
    first = ended.lines[0]
    assert first.startswith(f"rank {failing_rank} failed first, in {phase}, step "), ended
    what = {"raise": "ValueError: boom", "kill": "process is gone", "freeze": "not answered"}
    assert what[how] in first
    assert all(ended.statuses), ended
    assert ended.seconds < 15
