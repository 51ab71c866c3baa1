"""Runs of a trainer as processes of their own, which can be killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from dream_trainer.aside import require_trainer
from dream_trainer.errors import ConfigError
from dream_trainer.loggers import LOG_NAME
from dream_trainer.trainer.base import BaseTrainer, BaseTrainerConfig
from dream_trainer.verification.observer import Observation, Observer, Place
from dream_trainer.verification.processes import (
    Failure,
    StartMethod,
    begin,
    kill_group,
    pickled,
    prepare_to_fork,
    received,
)

#: Name of the observer among the trainer's callbacks.
_NAME = "verify-resume"


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
            job = pickled(job, "verify_resume")
        context: Any = multiprocessing.get_context(self.method)
        process = context.Process(
            target=_child, args=(job, notes, output, kill_at, os.getpid()), name="verify-resume"
        )
        start = time.monotonic()
        if not is_restart:
            shutil.rmtree(self.config.root_dir, ignore_errors=True)
        notes.write_bytes(b"")
        output.write_bytes(b"")
        prepare_to_fork(self.method)
        try:
            process.start()
            # In turns: whoever inherited its pipes would keep join() waiting after its death.
            while process.exitcode is None and time.monotonic() - start < self.timeout:
                process.join(0.05)
            is_late, code = process.exitcode is None, process.exitcode
        finally:
            kill_group(process)
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


def _child(
    job: Any, notes: Path, output: Path, kill_at: Place | None, parent: int
) -> None:  # pragma: no cover - in another process
    begin(parent, output)
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
            make_trainer, config = received(job)
            trainer = make_trainer(config)
            _check(trainer, config)
            trainer.callbacks = trainer.callbacks.followed_by(_NAME, Observer(tell, at_place))
            trainer.fit()
        except BaseException as error:  # noqa: BLE001 - the parent raises it
            tell(Failure.of(error))
        leave()  # the group with it; and no finalizer of the parent's runs here


def _check(trainer: Any, config: BaseTrainerConfig) -> None:
    """Refuse what would write elsewhere, or start other processes, before it does.

    Raises:
        ConfigError: listing everything.
    """
    require_trainer(trainer)
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
