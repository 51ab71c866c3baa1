"""verify_resume: a trainer against itself, straight and killed at every k-th step."""

from __future__ import annotations

import copy
import os
import secrets
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from dream_trainer.callbacks import CheckpointCallback
from dream_trainer.errors import ConfigError
from dream_trainer.trainer.base import BaseTrainer, BaseTrainerConfig
from dream_trainer.trainer.default_callbacks import TELLING
from dream_trainer.verification.comparison import Comparison, Fault
from dream_trainer.verification.diagnosis import diagnose
from dream_trainer.verification.observer import Place
from dream_trainer.verification.processes import StartMethod, default_start_method
from dream_trainer.verification.report import ResumeReport
from dream_trainer.verification.runs import Run, Runner

Config = TypeVar("Config", bound=BaseTrainerConfig)


def verify_resume(
    make_trainer: Callable[[Config], BaseTrainer],
    config: Config,
    *,
    steps: int = 6,
    every: int = 1,
    ignore: Sequence[str] = (),
    tell: Callable[[str], object] | None = print,
    timeout_seconds: float = 600.0,
    start_method: StartMethod | None = None,
) -> ResumeReport:
    """Find out whether a trainer resumes exactly.

    A few steps are run twice without interruption. Then, for every k-th step and every end of an
    epoch, a run is killed with SIGKILL after its checkpoint there, and resumed. Each is a process
    of its own. After every step all runs must agree to the bit: batches, random streams, weights,
    optimizers, the rest of the state, the attributes of the trainer, its callbacks and modules;
    and in the end the metrics log.

    Everything is written into a temporary folder (``TMPDIR`` chooses the disk). ``config`` stays
    as it is; a copy gets other limits and checkpoint triggers, and neither loggers, a progress bar
    nor a timeline. Only what happens within ``steps`` is verified: a small
    ``train_steps_per_epoch`` brings ends of epochs and validations into them.

    Args:
        make_trainer: the trainer's class, or any function from a configuration to a trainer.
            Whatever a restart of the program does belongs into it.
        config: of the run, with one device and one process.
        steps: optimizer steps of a run, at most.
        every: kill after every k-th step.
        ignore: paths that may differ, as the report names them; ``*`` is any text.
        tell: given a line after every run; None for silence.
        timeout_seconds: what one process may take.
        start_method: how processes start. The default is ``"fork"``, with one thread in each; it
            is ``"spawn"``, which needs a trainer that can be imported, if this process has used
            an accelerator or runs on macOS. Pass ``"spawn"`` where a fork fails for another
            reason, autograd's threads on a machine with GPUs for example.

    Returns:
        Whether all runs agree; else the first difference and its likely cause.

    Raises:
        ConfigError: several devices or processes, or a trainer with another configuration.
        Exception: what a run raises that was not resumed, as it was raised there.
        TimeoutError: a run was not done in time.
        RuntimeError: a process died by itself.
    """
    _require(steps, every)
    with tempfile.TemporaryDirectory(prefix="verify-resume-") as folder:
        made = _for_verification(config, str(Path(folder, "runs")), steps, every)
        method = start_method if start_method is not None else default_start_method()
        runner = Runner(make_trainer, made, Path(folder), method, timeout_seconds)
        report = _verify(runner, list(ignore), tell if tell is not None else _nothing)
    if report.is_exact and report.steps < steps:
        note = f"the configuration ends the run after {report.steps} of {steps} steps"
        report = replace(report, notes=(note, *report.notes))
    return report


def _verify(runner: Runner, ignore: Sequence[str], tell: Callable[[str], object]) -> ResumeReport:
    straight = _straight(runner)
    last = straight.observations[-1].place
    tell(f"straight run: {last.step} steps in {straight.seconds:.1f} s")
    kills = [one.place for one in straight.observations if one.is_saved and not one.place.is_end]
    if not kills:
        raise ConfigError(
            "verify_resume",
            [f"no checkpoint was made in {last.step} steps, so there is none to resume from"],
            "Choose a smaller `every`, or look at the checkpoint callback of the configuration.",
        )
    comparison = Comparison(straight, ignore)

    again = _straight(runner)
    fault = comparison.with_straight(again)
    tell(f"straight run again: {_outcome(fault)}")
    if fault is not None:
        return _report(comparison, (), fault)
    comparison.learn_noise(again)

    # The first fault of each run, the first one of its state alone, and where it was killed.
    faults: list[tuple[Fault, Place]] = []
    in_state: list[Fault] = []
    for place in kills:
        killed = _straight(runner, place)
        if (fault := comparison.with_straight(killed, until=place)) is not None:
            tell(f"straight run until {place}: {_outcome(fault)}")
            return _report(comparison, (), fault)
        comparison.learn_noise(killed)
        resumed = runner.run(is_restart=True)
        fault = comparison.with_resumed(resumed, place, killed)
        tell(f"killed after {place}, resumed: {_outcome(fault)}")
        if fault is not None:
            faults.append((fault, place))
            if not fault.difference.in_state:
                fault = comparison.with_resumed(resumed, place, killed, with_attributes=False)
            in_state += [] if fault is None else [fault]
    if not faults:
        return _report(comparison, kills, None)
    first, place = min(faults, key=lambda one: one[0].urgency)
    return _report(comparison, kills, first, place, in_state)


def _report(
    comparison: Comparison,
    kills: Sequence[Place],
    fault: Fault | None,
    killed_at: Place | None = None,
    in_state: Sequence[Fault] = (),
) -> ResumeReport:
    last = comparison.straight.observations[-1].place
    notes = [f"ignore={one!r} fits no path" for one in comparison.unused_patterns]
    if comparison.noise:
        notes.append(
            "not compared, because two straight runs differ in it (a clock?): "
            + ", ".join(sorted(comparison.noise))
        )
    exact = ResumeReport(
        is_exact=True,
        steps=last.step,
        kills=tuple(place.step for place in kills),
        num_values=len(comparison.paths),
    )
    if fault is None:
        return replace(exact, notes=(*notes, *_not_covered(comparison.straight)))
    if not fault.difference.in_state:
        path = fault.difference.path
        if in_state:
            later = min(in_state, key=lambda one: one.urgency).difference
            notes.append(f"the run itself differs from {later.place} on: {later.path}")
        else:
            notes.append(
                "batches, state and log agree to the end. If the attribute has no influence on "
                f"the run, pass ignore=[{path!r}]"
            )
    return replace(
        exact,
        is_exact=False,
        difference=fault.difference,
        killed_at=None if killed_at is None else str(killed_at),
        also=fault.also,
        cause=diagnose(fault.evidence),
        notes=tuple(notes),
        traceback=fault.traceback,
    )


def _not_covered(straight: Run) -> list[str]:
    """What a run can do and this one did not."""
    last = straight.observations[-1]
    missing = []
    if all(one.place.in_epoch or not one.place.step for one in straight.observations):
        missing.append("no epoch ended")
    if last.num_validations == 0:
        missing.append("no validation ran")
    if not missing:
        return []
    half = max(1, last.place.step // 2)
    return [
        f"{' and '.join(missing)} within these steps; train_steps_per_epoch={half} in the "
        "training_parameters would bring it in"
    ]


def _straight(runner: Runner, kill_at: Place | None = None) -> Run:
    run = runner.run(kill_at)
    if run.failure is not None:
        run.failure.raise_again()
    return run


def _outcome(fault: Fault | None) -> str:
    if fault is None:
        return "exact"
    return f"differs at {fault.difference.place} ({fault.difference.path})"


def _require(steps: int, every: int) -> None:
    problems = [
        f"{name}={value!r} is not a whole number above 0"
        for name, value in (("steps", steps), ("every", every))
        if not (isinstance(value, int) and value >= 1)
    ]
    size = os.environ.get("WORLD_SIZE", "1")
    if size != "1":
        problems.append(f"this is one of {size} processes (WORLD_SIZE); it works with one")
    if problems:
        raise ConfigError(
            "verify_resume",
            problems,
            "Start the program as one process, with device_parameters="
            "DeviceParameters.SINGLE_DEVICE()."
            if size != "1"
            else "",
        )


def _for_verification(config: Config, root: str, steps: int, every: int) -> Config:
    """A copy of a configuration for a few steps in a place of its own."""
    made = copy.copy(config)
    limits = config.training_parameters
    made.training_parameters = replace(
        limits, max_steps=min(steps, limits.max_steps or steps), max_time=None
    )
    made.checkpoint_parameters = replace(
        config.checkpoint_parameters,
        enable=True,
        every_n_steps=every,
        every_n_epochs=1,
        every_n_minutes=None,
        keep_last=1,
        keep_every_n_steps=None,
        async_save=False,  # a checkpoint must be there when its hook returns
        resume="auto",
    )
    made.callbacks = {**config.callbacks, **dict.fromkeys(TELLING)}
    if made.callbacks.get("checkpoint", True) is None:
        made.callbacks["checkpoint"] = CheckpointCallback()
    made.loggers = {}
    made.root_dir = root
    made.experiment = config.experiment or "verify-resume"
    # One for all runs: each would draw its own.
    made.seed = secrets.randbits(32) if config.seed is None else config.seed
    return made


def _nothing(line: str) -> None:
    pass
