"""Processes that run a trainer: how they start, end with their parent, and are killed."""

from __future__ import annotations

import ctypes
import os
import pickle
import random
import signal
import sys
import traceback
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
import torch

from dream_trainer.errors import ConfigError

StartMethod = Literal["fork", "spawn"]
_PR_SET_PDEATHSIG = 1


class RemoteTraceback(Exception):  # noqa: N818 - the cause of an exception, not one itself
    """Carries the traceback of another process as text."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


@dataclass(frozen=True)
class Failure:
    """An exception that ended a run."""

    text: str
    traceback: str
    pickled: bytes | None
    """None if the exception cannot be sent from process to process."""

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """What is left of an exception in another process."""
        pickled = None
        try:
            pickled = pickle.dumps(error)
            pickle.loads(pickled)
        except Exception:  # noqa: BLE001 - any class, with any bug in its pickling
            pickled = None
        text = f"{type(error).__name__}: {error}"
        return cls(text, "".join(traceback.format_exception(error)), pickled)

    def raise_again(self) -> NoReturn:
        """Raise it here as what it was there, with its traceback."""
        error = None if self.pickled is None else pickle.loads(self.pickled)
        if not isinstance(error, Exception):  # SystemExit must not end this process
            error = RuntimeError(self.text)
        raise error from RemoteTraceback(self.traceback)


def default_start_method() -> StartMethod:
    """Fork, which takes no time and needs nothing importable, wherever it is safe."""
    # A forked process cannot use an accelerator that its parent has used; on macOS, hardly any
    # library survives a fork.
    in_use = torch.cuda.is_initialized() or torch.xpu.is_initialized()
    return "spawn" if in_use or sys.platform != "linux" else "fork"


def pickled(job: Any, caller: str) -> bytes:
    """What a new interpreter is sent.

    Args:
        job: what its process needs.
        caller: name of the function that starts it, for the message.

    Raises:
        ConfigError: it does not pickle.
    """
    try:
        return pickle.dumps(job)
    except Exception as error:
        raise ConfigError(
            caller,
            [
                "each process is a new interpreter, because this one has used an accelerator (or "
                f"start_method is 'spawn'), and what it needs cannot be sent there: {error}"
            ],
            "Call it before anything uses the accelerator; or define the trainer, its callbacks "
            "and make_trainer at the top of a module.",
        ) from error


def prepare_to_fork(method: StartMethod) -> None:
    """Once, here: every one of the many processes would load Fabric for itself, for seconds."""
    sys.stdout.flush()
    sys.stderr.flush()
    if method == "fork":
        from dream_trainer.world import DreamWorld  # noqa: F401


def begin(parent: int, output: Path) -> None:
    """Become a process that leads a group, says nothing, and ends with its parent.

    Args:
        parent: its process id.
        output: a file for what the run prints; it is said if the run dies.
    """
    os.setsid()  # a group of its own, so that its loader workers end with it
    _die_with(parent)
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout = sys.stderr = os.fdopen(file, "w", buffering=1)
    # What a fork inherits and a restarted program would not have.
    random.seed()
    np.random.seed()
    torch.default_generator.manual_seed(torch.Generator().initial_seed())


def received(job: Any) -> Any:
    """What its process was given, pickled (see `pickled`) or by a fork."""
    if isinstance(job, bytes):
        return pickle.loads(job)  # of the parent
    # GNU's OpenMP waits for ever in a fork of a process that has used its threads.
    if torch.get_num_threads() > 1:
        torch.set_num_threads(1)
    return job


def _die_with(parent: int) -> None:
    """End this process when its parent ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before we asked
        os._exit(1)


def kill_group(process: Any) -> None:
    """End a process and all that it has started."""
    if process.pid is None:
        return
    for kill in (partial(os.killpg, process.pid, signal.SIGKILL), process.kill):
        try:
            kill()
        except (ProcessLookupError, PermissionError):
            continue  # gone already, or not yet the leader of a group
    process.join()
    process.close()
