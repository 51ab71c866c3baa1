"""A function on several ranks, each a forked process, as torchrun would start them."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from typing import Any

import torch


class RankError(AssertionError):
    """Some rank failed, or took too long."""


def rank_environment(rank: int, size: int, port: int) -> dict[str, str]:
    """The variables that torchrun gives each process of one machine.

    Args:
        rank: of the process.
        size: number of processes.
        port: a free one, the same for all.
    """
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": f"test-{port}",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }


def run_ranks(
    size: int, function: Callable[..., Any], *arguments: Any, time_limit: float = 60.0
) -> list[Any]:
    """Call ``function(*arguments)`` on several ranks, each a fork of this process with one thread.

    The function may be a closure; what it returns must pickle. The group of ranks begins where
    the function first launches a trainer. A process whose torch has used its threads, or an
    accelerator, cannot be forked safely: set ``OMP_NUM_THREADS=1`` for tests.

    Args:
        size: number of ranks.
        function: called on each rank.
        arguments: its arguments.
        time_limit: seconds that all of it may take.

    Returns:
        What each rank returned, by rank.

    Raises:
        RankError: a rank raised, died or was not done in time; all are ended, and it has every
            traceback.
        RuntimeError: this system cannot fork.
    """
    if "fork" not in multiprocessing.get_all_start_methods():
        raise RuntimeError(f"ranks are forked, which {sys.platform} cannot do; test on Linux")
    # Here, once: every rank would load Fabric for itself, for seconds.
    importlib.import_module("dream_trainer.world.dream_world")
    ranks = _Ranks(size, function, arguments, time_limit)
    try:
        ranks.listen(time_limit)
    finally:
        ranks.end()
    if ranks.failures:
        failed = sorted(ranks.failures.items())
        raise RankError("\n".join(f"rank {rank}: {text}" for rank, text in failed))
    return [ranks.results[rank] for rank in range(size)]


class _Ranks:
    """Forked processes, and what they answer."""

    def __init__(
        self, size: int, function: Callable[..., Any], arguments: Any, time_limit: float
    ) -> None:
        self.results: dict[int, Any] = {}
        self.failures: dict[int, str] = {}
        self._processes: list[ForkProcess] = []
        self._pipes: dict[Connection, int] = {}
        context, port = multiprocessing.get_context("fork"), free_port()
        sys.stdout.flush()
        sys.stderr.flush()
        for rank in range(size):
            receiver, sender = context.Pipe()
            environment = rank_environment(rank, size, port)
            process = context.Process(
                target=_rank, args=(sender, environment, function, arguments, time_limit)
            )
            process.start()
            sender.close()
            self._processes.append(process)
            self._pipes[receiver] = rank

    def listen(self, time_limit: float) -> None:
        deadline = time.monotonic() + time_limit
        left = dict(self._pipes)
        while left:
            # Once one has failed, the others wait for it in vain.
            seconds = 5.0 if self.failures else deadline - time.monotonic()
            ready = [one for one in wait(list(left), max(seconds, 0)) if one in self._pipes]
            if not ready:
                self.failures |= dict.fromkeys(left.values(), f"not done after {time_limit:.0f} s")
                return
            for pipe in ready:
                assert isinstance(pipe, Connection)
                self._take_answer(pipe, left.pop(pipe))
        if not self.failures:
            next(iter(self._pipes)).send_bytes(b"leave")

    def _take_answer(self, pipe: Connection, rank: int) -> None:
        try:
            succeeded, value = pickle.loads(pipe.recv_bytes())
        except EOFError:
            self._processes[rank].join(5)
            code = self._processes[rank].exitcode
            succeeded, value = False, f"died with exit code {code}"
        (self.results if succeeded else self.failures)[rank] = value

    def end(self) -> None:
        for process in self._processes:
            if self.failures or sys.exc_info()[0] is not None:
                process.kill()
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()
            process.close()
        for pipe in self._pipes:
            pipe.close()


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _rank(
    sender: Connection,
    environment: dict[str, str],
    function: Callable[..., Any],
    arguments: Any,
    time_limit: float,
) -> None:
    os.environ.update(environment)
    signal.alarm(int(time_limit) + 30)  # whatever happens to the parent
    torch.set_num_threads(1)
    try:
        answer = pickle.dumps((True, function(*arguments)))
    except BaseException:  # noqa: BLE001 - the parent raises it
        answer = pickle.dumps((False, traceback.format_exc()))
    sender.send_bytes(answer)
    if environment["RANK"] == "0":
        sender.recv_bytes()  # it carries the store, so it leaves last
    sys.stdout.flush()
    sys.stderr.flush()
    # At once: interpreter shutdown would run finalizers that belong to the parent.
    os._exit(0)
