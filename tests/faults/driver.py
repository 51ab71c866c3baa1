"""Starts runs as real processes, waits for or kills them, and compares how they end.

A process is a fork of this one, which has imported torch already: it has its own pid, memory and
files, dies of SIGKILL like any other, and starts in milliseconds where ``python`` needs seconds.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import pickle
import random
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import killable_run
import psutil
import torch
from support import differences, free_port, rank_environment

from dream_trainer.checkpointing import CheckpointStore
from dream_trainer.storage import Manifest

KILLED = -signal.SIGKILL
#: After so many seconds a process counts as hanging.
SECONDS = 60
#: Everything that a test draws at random comes from this.
SEED = int(os.environ.get("FAULTS_SEED", "1"))


def draw(*place: object) -> random.Random:
    """Random numbers that depend on the seed and on the place that uses them only."""
    return random.Random(f"{SEED} {place}")


# ---------------------------------------------------------------------- processes


class Processes:
    """The ranks of one job, started as torchrun would; a job of one rank is started alone.

    Args:
        function: what each process does; it exits with 0 if this returns, with 1 if it raises.
        ranks: how many processes.
    """

    def __init__(self, function: Callable[..., Any], *arguments: Any, ranks: int = 1) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        port = free_port()
        self._stacks = tempfile.TemporaryFile("w+")  # noqa: SIM115 - as long as the processes
        # Ends when the last of the others does: rank 0 carries the store and leaves last.
        others = os.pipe()
        self._processes: list[psutil.Process] = []
        for rank in range(ranks):
            environment = rank_environment(rank, ranks, port) if ranks > 1 else {}
            pid = os.fork()
            if pid == 0:
                os.close(others[0] if rank else others[1])
                faulthandler.enable(self._stacks)
                _child(function, arguments, environment, None if rank else others[0])
            self._processes.append(psutil.Process(pid))
        for end in others:
            os.close(end)

    def wait(self) -> list[int]:
        """Exit codes by rank, negative for the signal that ended one.

        Raises:
            AssertionError: somebody hangs; with the stacks of its threads and loader workers.
        """
        try:
            _, alive = psutil.wait_procs(self._processes, SECONDS)
            hanging = [rank for rank, p in enumerate(self._processes) if p in alive]
            assert not hanging, f"ranks {hanging} hang\n{self._stacks_of(alive)}"
            return [int(process.wait()) for process in self._processes]
        finally:
            self.kill()
            self._stacks.close()

    def _stacks_of(self, processes: list[psutil.Process]) -> str:
        for process in processes:
            # One after the other, or their lines would mix; faulthandler writes them.
            for one in (*process.children(recursive=True), process):
                self._stacks.write(f"\n{one}\n")
                self._stacks.flush()
                one.send_signal(signal.SIGABRT)
                psutil.wait_procs([one], 5)
                self._stacks.seek(0, os.SEEK_END)
        self._stacks.seek(0)
        return self._stacks.read()

    def kill(self, rank: int | None = None) -> None:
        """SIGKILL to one rank, or to everything that any of them has left behind."""
        if rank is not None:
            self._processes[rank].kill()
            return
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)  # its loader's workers as well
            process.wait()


def _child(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    environment: dict[str, str],
    others: int | None,
) -> None:
    """The life of a forked process; does not return."""
    status = 1
    try:
        os.setpgid(0, 0)
        signal.alarm(2 * SECONDS)  # whatever happens to the parent
        os.environ.update(environment)
        torch.set_num_threads(1)
        function(*arguments)
        if others is not None:
            os.read(others, 1)
        status = 0
    except BaseException:  # noqa: BLE001 - it must not return into the parent's code
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # At once: interpreter shutdown would run finalizers that belong to the parent.
        os._exit(status)


# ---------------------------------------------------------------------- a job


@dataclass(frozen=True)
class Job:
    """A killable run under one name; every ``start`` of it continues what is on disk."""

    root: Path
    name: str
    cell: str = "both"
    workers: int = 0
    ranks: int = 1
    kind: type[killable_run.Run] = killable_run.Run
    layout: str = "ddp"

    def start(self, moment: str = "") -> Processes:
        arguments = (self.root, self.name, self.cell, self.workers, moment, self.kind, self.layout)
        return Processes(killable_run.run, *arguments, ranks=self.ranks)

    def run(self, moment: str = "") -> list[int]:
        """Exit codes of one start; it must have continued what was newest, and nothing else."""
        newest, before = self.assert_whole(), self.starts()
        codes = self.start(moment).wait()
        self.assert_whole()
        new = self.starts()[len(before) :]
        assert new in ([], [newest]), f"{self}: started at step {new}, its newest was {newest}"
        return codes

    def finish(self, moment: str = "") -> End:
        """Start it and let it end; nothing of earlier kills is left then."""
        codes = self.run(moment)
        assert codes == [0] * self.ranks, f"{self}: exit codes {codes} of a run nobody killed"
        store = CheckpointStore(self.directory / "checkpoints")
        newest = (store.directory / "newest").resolve()
        assert newest == store.paths()[-1].resolve(), f"{self}: newest is {newest.name}"
        # Two newest, the best, and one that a kill kept from being deleted.
        assert len(store.paths()) <= 4, f"{self}: {store.paths()}"
        leftovers = [path.name for path in self.directory.rglob("*.tmp")]
        assert not leftovers, f"{self}: {leftovers} left behind; killed in {self.killed_where()}"
        return self.end()

    def killed(self, moment: str) -> None:
        """Start it and see it die of that moment, with all of its ranks."""
        codes = self.run(moment)
        # One that was not killed itself has lost its peers.
        is_dead = KILLED in codes and set(codes) <= {KILLED, 1}
        assert is_dead, f"{self}: exit codes {codes}, {moment} was not reached"

    @property
    def directory(self) -> Path:
        return killable_run.directory(self.root, self.name)

    def starts(self) -> list[int]:
        """Steps at which its processes started to train."""
        path = self.root / f"{self.name}.starts"
        return [int(line) for line in path.read_text().split()] if path.exists() else []

    def marks(self, rank: int = 0) -> list[int]:
        """How often the moment was reached by the end of each save, and of the run."""
        path = self.root / f"{self.name}.marks-{rank}"
        return [int(line) for line in path.read_text().split()]

    def killed_where(self) -> str:
        path = self.root / f"{self.name}.killed"
        return path.read_text() if path.exists() else "killed from outside"

    def end(self) -> End:
        paths = [self.root / f"{self.name}.end-{rank}" for rank in range(self.ranks)]
        states = [pickle.loads(path.read_bytes()) for path in paths]
        return End(states, (self.directory / "metrics.jsonl").read_bytes())

    def assert_whole(self) -> int:
        """Every checkpoint verifies.

        Returns:
            The step of the newest; 0 if there is none.
        """
        newest = 0
        for path in CheckpointStore(self.directory / "checkpoints").paths():
            manifest = Manifest.read(path)
            manifest.verify(path)
            newest = manifest.step
        return newest


@dataclass(frozen=True)
class End:
    """How a run ended: the state of every rank by path, tensors as bytes, and the log."""

    states: list[dict[str, Any]]
    log: bytes

    def differences(self, other: End) -> list[str]:
        """What is not the same to the bit, most readable first."""
        assert len(self.states) == len(other.states)
        found = [
            f"rank {rank}: {path}"
            for rank, (one, two) in enumerate(zip(self.states, other.states, strict=True))
            for path in differences(one, two)
            # Rank 0 alone writes the log and knows its length.
            if rank == 0 or path not in ("/callbacks/metrics/size", "/callbacks/metrics/crc32")
        ]
        if self.log != other.log:
            rows, others = self.log.splitlines(), other.log.splitlines()
            same = sum(a == b for a, b in zip(rows, others, strict=False))
            found.append(f"metrics.jsonl: {len(rows)} and {len(others)} rows, {same} the same")
        return found


def assert_same_end(one: End, other: End, job: Job) -> None:
    found = one.differences(other)
    where = job.killed_where()
    assert not found, f"{job} ended otherwise\n" + "\n".join(found[:12]) + f"\nkilled in {where}"
