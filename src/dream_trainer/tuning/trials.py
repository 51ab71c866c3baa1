"""Trials on all ranks, each in processes of its own, so that no failure reaches the next one."""

from __future__ import annotations

import itertools
import os
import pickle
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dream_trainer.configs import DeviceParameters
from dream_trainer.errors import ConfigError
from dream_trainer.lazy_names import loading
from dream_trainer.tuning.trial_run import RankOutcome, TrialJob, run_trial
from dream_trainer.verification.processes import (
    StartMethod,
    kill_group,
    pickled,
    prepare_to_fork,
)

if TYPE_CHECKING:
    import torch.distributed as dist

#: For the rank that was first to tell why, once another one has told that it cannot go on.
_SECONDS_TO_TELL = 10.0
_SECONDS_BETWEEN_LOOKS = 0.1
#: Searches of this process, as on every other rank: keys of the last one are still in the store.
_numbers = itertools.count()


class Trials:
    """Starts a trial's processes, and agrees with the other ranks on how it went.

    Without a launcher this process starts all ranks. Under torchrun it starts one, and the ranks
    meet in the launcher's store. A rank that has no memory left tells it, and all processes of
    the trial are killed, also those that wait for it in a collective.

    Args:
        devices: of the run.
        folder: where output of the processes is kept.
        method: how processes start.
        timeout: seconds that a trial may take.

    Attributes:
        rank: of this process.
        size: ranks of a trial.
        ranks_here: of them on this machine.

    Raises:
        ConfigError: the ranks cannot be started from here.
    """

    def __init__(
        self, devices: DeviceParameters, folder: Path, method: StartMethod, timeout: float
    ) -> None:
        self._folder, self._method, self._timeout = folder, method, timeout
        self._store: dist.Store | None = None
        self._trial = itertools.count()
        self.rank, self.size = 0, _number_of_ranks(devices)
        self.ranks_here = self.size
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            self.rank = int(os.environ["RANK"])
            self.ranks_here = int(os.environ["LOCAL_WORLD_SIZE"])
            self._store = _common_store(timeout)

    def run(self, job: TrialJob) -> list[RankOutcome]:
        """Try; every process is gone when this returns. The same result on every rank."""
        number = next(self._trial)
        given: Any = pickled(job, "find_batch_size") if self._method == "spawn" else job
        prepare_to_fork(self._method)
        context: Any = get_context(self._method)
        processes: dict[Any, tuple[int, Any]] = {}
        try:
            for rank, environment in self._environments(number).items():
                receiver, sender = context.Pipe(duplex=False)
                output = self._folder / f"output-{rank}"
                output.write_bytes(b"")
                process = context.Process(
                    target=run_trial,
                    args=(given, environment, sender, output, os.getpid()),
                    name="batch-size-trial",
                )
                process.start()
                sender.close()
                processes[receiver] = rank, process
            told = self._wait(processes, number)
        finally:
            for pipe, (_, process) in processes.items():
                pipe.close()
                kill_group(process)
        return self._of_all_ranks(told, number)

    # ------------------------------------------------------------------ inside

    def _environments(self, number: int) -> dict[int, dict[str, str]]:
        """What the processes that start here find in their environment, by rank."""
        if self._store is not None:
            key = f"port/{number}"
            if self.rank == 0:
                self._store.set(key, str(_free_port()))
            port = self._store.get(key).decode()
            return {
                self.rank: {"MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": "False"},
            }
        if self.size == 1:
            return {0: {}}
        port, size = str(_free_port()), str(self.size)
        return {
            rank: {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "GROUP_RANK": "0",
                "WORLD_SIZE": size,
                "LOCAL_WORLD_SIZE": size,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "TORCHELASTIC_RUN_ID": f"find_batch_size-{port}",
            }
            for rank in range(self.size)
        }

    def _wait(
        self, processes: Mapping[Any, tuple[int, Any]], number: int
    ) -> dict[int, RankOutcome]:
        """What the processes here tell, until the outcome is known or time is over."""
        told: dict[int, RankOutcome] = {}
        open_pipes = dict(processes)
        deadline = time.monotonic() + self._timeout
        while open_pipes and time.monotonic() < deadline:
            for pipe in wait(list(open_pipes), timeout=_SECONDS_BETWEEN_LOOKS):
                rank, process = open_pipes.pop(pipe)
                told[rank] = self._told(pipe, rank, process)
                if told[rank].outcome == "failed":
                    deadline = min(deadline, time.monotonic() + _SECONDS_TO_TELL)
            if any(one.outcome == "out_of_memory" for one in told.values()):
                if self._store is not None:
                    self._store.set(f"end/{number}", "1")
                return told
            if self._store is not None and self._store.check([f"end/{number}"]):
                return told
        text = f"it was not done after {self._timeout:.0f} s"
        late = RankOutcome("failed", text, is_consequence=bool(told))
        return told | {rank: late for rank, _ in open_pipes.values()}

    def _told(self, pipe: Any, rank: int, process: Any) -> RankOutcome:
        with suppress(EOFError, OSError, pickle.UnpicklingError):
            outcome: RankOutcome = pipe.recv()
            return outcome
        process.join(_SECONDS_TO_TELL)
        code = process.exitcode
        if code == -signal.SIGKILL:
            # Nobody here has sent it.
            return RankOutcome("out_of_memory", "the system killed a process")
        tail = (self._folder / f"output-{rank}").read_text(errors="replace")[-2000:]
        text = f"a process died with exit code {code}. Its last output:\n{tail}"
        return RankOutcome("failed", text, is_consequence=self.size > 1)

    def _of_all_ranks(self, told: dict[int, RankOutcome], number: int) -> list[RankOutcome]:
        if self._store is None:
            return list(told.values())
        mine = list(told.values())
        self._store.set(f"told/{number}/{self.rank}", pickle.dumps(mine).hex())
        keys = [f"told/{number}/{rank}" for rank in range(self.size)]
        self._store.wait(keys)
        # Written by the other ranks of this program.
        return [
            one
            for key in keys
            for one in pickle.loads(bytes.fromhex(self._store.get(key).decode()))
        ]


def worst(told: Sequence[RankOutcome]) -> RankOutcome:
    """What the ranks' outcomes come to: no memory on one rank is no memory.

    Raises:
        Exception: what a rank raised that has nothing to do with memory.
        RuntimeError: a process died.
    """
    for outcome in ("out_of_memory", "more_than_the_data"):
        if (found := next((one for one in told if one.outcome == outcome), None)) is not None:
            return found
    failed = [one for one in told if one.outcome == "failed"]
    if failed:
        first = min(failed, key=lambda one: one.is_consequence)
        if first.failure is not None:
            first.failure.raise_again()
        raise RuntimeError(first.text)
    return RankOutcome(
        "fits",
        seconds=max(one.seconds for one in told),
        samples=sum(one.samples for one in told) / len(told),
        memory=max(one.memory for one in told),
    )


def _number_of_ranks(devices: DeviceParameters) -> int:
    # Here, because they load Fabric.
    with loading():  # Fabric, maybe for the first time
        from dream_trainer.world.launchers import find_launcher
    from dream_trainer.world.strategy import local_processes

    launched = find_launcher()
    if launched is not None and launched.size > 1:
        if launched.by != "torchrun":
            raise ConfigError(
                "find_batch_size",
                [f"{launched.by} started {launched.size} processes; trials know torchrun only"],
                "Start the program with torchrun, or as one process on one machine.",
            )
        return launched.size
    if devices.num_nodes != 1:
        raise ConfigError(
            "device_parameters",
            [f"num_nodes={devices.num_nodes}, and this is one process"],
            "Start it with torchrun on each machine, or set num_nodes=1 and devices.",
        )
    return local_processes(devices)


def _common_store(timeout: float) -> dist.Store:
    """Where ranks that a launcher started meet without a process group."""
    import torch.distributed as dist

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    has_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    carries = not has_agent and os.environ["RANK"] == "0"
    store = dist.TCPStore(
        address,
        port,
        is_master=carries,
        timeout=timedelta(seconds=timeout + _SECONDS_TO_TELL),
        wait_for_workers=False,
        multi_tenant=True,
    )
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"find_batch_size/{attempt}/{next(_numbers)}", store)


def _free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return int(server.getsockname()[1])
