"""Runs ranks to their end, however they end, and looks at their statuses and stderr."""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from support import free_port, rank_environment

from dream_trainer.coordination import RankFailedError

_fork = get_context("fork")
_TIME_LIMIT = 40.0


@dataclass
class Ended:
    """How a run ended: exit statuses by rank, lines of stderr in their order."""

    statuses: list[int]
    lines: list[str]
    seconds: float


def run_to_the_end(root: Path, size: int, function: Any, *arguments: Any) -> Ended:
    """Fork ranks that write to one stderr; one that is left after 40 s is an error."""
    log, port = root / "stderr.txt", free_port()
    environments = [rank_environment(rank, size, port) for rank in range(size)]
    processes = [
        _fork.Process(target=_rank, args=(log, environment, function, arguments))
        for environment in environments
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
    # A shell that starts the tests in the background has Ctrl-C ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
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
