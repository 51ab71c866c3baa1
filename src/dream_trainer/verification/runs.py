"""Runs of a trainer as processes of their own, which can be killed."""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
import torch

from dream_trainer.callbacks import CallbackList
from dream_trainer.errors import ConfigError
from dream_trainer.trainer.base import BaseTrainer, BaseTrainerConfig
from dream_trainer.verification.observer import Observation, Observer, Place

LOG_NAME = "metrics.jsonl"
StartMethod = Literal["fork", "spawn"]
_PR_SET_PDEATHSIG = 1
#: Name of the observer among the trainer's callbacks.
_NAME = "verify-resume"


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


@dataclass(frozen=True)
class Run:
    """What a process told before it ended."""

    observations: tuple[Observation, ...]
    """The first is that of ``pre_fit``."""
    log: tuple[Mapping[str, str], ...]
    """Rows of the metrics log, with numbers as they are written."""
    failure: Failure | None
    seconds: float


@dataclass(frozen=True)
class Runner:
    """Starts a trainer as often as wanted; every process is gone when `run` returns.

    Args:
        make_trainer: called in each process.
        config: what it is called with. Its ``root_dir`` is deleted before every fresh run.
        folder: where notes of the processes are kept.
        method: how processes start.
        timeout: seconds that one may take.
    """

    make_trainer: Callable[[Any], BaseTrainer]
    config: BaseTrainerConfig
    folder: Path
    method: StartMethod
    timeout: float

    def run(self, kill_at: Place | None = None, *, is_restart: bool = False) -> Run:
        """Fit in a process of its own.

        Args:
            kill_at: send SIGKILL there, when the observation of the place is made.
            is_restart: go on with what the run before has left on disk.

        Raises:
            TimeoutError: it was not done in time.
            RuntimeError: it died by itself.
        """
        notes, output = self.folder / "notes", self.folder / "output"
        job: Any = (self.make_trainer, self.config)
        if self.method == "spawn":
            job = _pickled(job)
        context: Any = multiprocessing.get_context(self.method)
        process = context.Process(
            target=_child, args=(job, notes, output, kill_at, os.getpid()), name="verify-resume"
        )
        start = time.monotonic()
        if not is_restart:
            shutil.rmtree(self.config.root_dir, ignore_errors=True)
        notes.write_bytes(b"")
        output.write_bytes(b"")
        sys.stdout.flush()
        sys.stderr.flush()
        if self.method == "fork":
            # Once, here: every one of the many runs would load Fabric for itself, for seconds.
            from dream_trainer.world import DreamWorld  # noqa: F401
        try:
            process.start()
            # In turns: whoever inherited its pipes would keep join() waiting after its death.
            while process.exitcode is None and time.monotonic() - start < self.timeout:
                process.join(0.05)
            is_late, code = process.exitcode is None, process.exitcode
        finally:
            _kill_group(process)
        said = tuple(_read(notes))
        observations = tuple(one for one in said if isinstance(one, Observation))
        failure = next((one for one in said if isinstance(one, Failure)), None)
        where = f"step {observations[-1].place.step}" if observations else "its start"
        tail = f"Its last output:\n{output.read_text(errors='replace')[-2000:]}"
        if is_late:
            raise TimeoutError(
                f"a run was not done after {self.timeout:.0f} s; it had come to {where}. Take "
                f"fewer steps, or a larger timeout_seconds. {tail}"
            )
        if failure is None and "ready to die" not in said:
            hint = ""
            if self.method == "spawn" and not observations:
                hint = 'A script needs `if __name__ == "__main__":` around its call. '
            raise RuntimeError(f"a run died at {where} with exit code {code}. {hint}{tail}")
        log = _read_log(Path(observations[0].run_directory)) if observations else ()
        return Run(observations, log, failure, time.monotonic() - start)


def default_start_method() -> StartMethod:
    """Fork, which takes no time and needs nothing importable, wherever it is safe."""
    # A forked process cannot use an accelerator that its parent has used; on macOS, hardly any
    # library survives a fork.
    in_use = torch.cuda.is_initialized() or torch.xpu.is_initialized()
    return "spawn" if in_use or sys.platform != "linux" else "fork"


def _pickled(job: Any) -> bytes:
    try:
        return pickle.dumps(job)
    except Exception as error:
        raise ConfigError(
            "verify_resume",
            [
                "each run is a new interpreter, because this process has used an accelerator (or "
                f"start_method is 'spawn'), and what it needs cannot be sent there: {error}"
            ],
            "Call it before anything uses the accelerator; or define the trainer, its callbacks "
            "and make_trainer at the top of a module.",
        ) from error


def _child(
    job: Any, notes: Path, output: Path, kill_at: Place | None, parent: int
) -> None:  # pragma: no cover - in another process
    os.setsid()  # a group of its own, so that its loader workers end with it
    _die_with(parent)
    _redirect(output)
    _start_afresh()
    if not isinstance(job, bytes) and torch.get_num_threads() > 1:
        # GNU's OpenMP waits for ever in a fork of a process that has used its threads.
        torch.set_num_threads(1)
    with notes.open("ab", buffering=0) as file:

        def tell(what: Any) -> None:
            file.write(pickle.dumps(what))

        def leave() -> NoReturn:
            tell("ready to die")
            os.killpg(0, signal.SIGKILL)
            raise AssertionError("still alive")

        def at_place(place: Place) -> None:
            if place == kill_at:
                leave()

        try:
            make_trainer, config = pickle.loads(job) if isinstance(job, bytes) else job
            trainer = make_trainer(config)
            _check(trainer, config)
            own = {name: trainer.callbacks[name] for name in trainer.callbacks}
            observer = Observer(tell, at_place)
            trainer.callbacks = CallbackList(
                {**own, _NAME: observer}, foreign=trainer.world.callbacks
            )
            trainer.fit()
        except BaseException as error:  # noqa: BLE001 - the parent raises it
            tell(Failure.of(error))
        leave()  # the group with it; and no finalizer of the parent's runs here


def _check(trainer: Any, config: BaseTrainerConfig) -> None:
    """Refuse what would write elsewhere, or start other processes, before it does.

    Raises:
        ConfigError: listing everything.
    """
    if not isinstance(trainer, BaseTrainer):
        raise ConfigError(
            "make_trainer",
            [f"it returned a {type(trainer).__name__}"],
            "Pass a subclass of BaseTrainer, or a function from a configuration to a trainer.",
        )
    problems = [
        f"the trainer's {name} is {getattr(trainer.config, name)!r}, not that of the configuration"
        for name in ("root_dir", "training_parameters", "checkpoint_parameters")
        if getattr(trainer.config, name) != getattr(config, name)
    ]
    if problems:
        raise ConfigError(
            "make_trainer", problems, "Hand the configuration on to the trainer as it is."
        )
    try:
        size: int | None = trainer.world.size
    except RuntimeError:  # not known before launch, so launching starts processes
        size = None
    if size != 1:
        raise ConfigError(
            "device_parameters",
            [f"{size or 'several'} processes; verify_resume works with one"],
            "Set device_parameters=DeviceParameters.SINGLE_DEVICE() in the configuration, and "
            "start the program without torchrun.",
        )


def _start_afresh() -> None:
    """What a fork inherits and a restarted program would not have."""
    random.seed()
    np.random.seed()
    torch.default_generator.manual_seed(torch.Generator().initial_seed())


def _die_with(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before we asked
        os._exit(1)


def _redirect(output: Path) -> None:
    """Let nothing that the run prints reach the terminal; it is said if the run dies."""
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout = sys.stderr = os.fdopen(file, "w", buffering=1)


def _kill_group(process: Any) -> None:
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


def _read(notes: Path) -> Iterator[Any]:
    with notes.open("rb") as file:
        while True:
            try:
                yield pickle.load(file)  # written by our own child
            except (EOFError, pickle.UnpicklingError):
                return


def _read_log(run_directory: Path) -> tuple[Mapping[str, str], ...]:
    path = run_directory / LOG_NAME
    if not path.exists():
        return ()
    lines = path.read_text(encoding="utf-8").splitlines()
    return tuple(json.loads(line, parse_float=str, parse_int=str) for line in lines)
