"""find_batch_size: larger and larger batches, until memory or data end."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from dream_trainer.aside import nothing_on_disk, steps_alone
from dream_trainer.configs import DeviceParameters
from dream_trainer.errors import ConfigError
from dream_trainer.trainer.base import BaseTrainer, BaseTrainerConfig
from dream_trainer.trainer.default_callbacks import DEFAULT_CALLBACKS
from dream_trainer.tuning.batch_size_result import BatchSizeResult, Trial
from dream_trainer.tuning.config_field import field_value, with_field
from dream_trainer.tuning.size_search import SizeMode, sizes_to_try
from dream_trainer.verification.processes import StartMethod, default_start_method

Config = TypeVar("Config", bound=BaseTrainerConfig)
_FEWEST_STEPS = 2


def find_batch_size(
    make_trainer: Callable[[Config], BaseTrainer],
    config: Config,
    *,
    field: str = "batch_size",
    mode: SizeMode = "binsearch",
    start: int | None = None,
    max_size: int | None = None,
    steps: int = 4,
    memory_limit: int | None = None,
    tell: Callable[[str], object] | None = print,
    timeout_seconds: float = 600.0,
    start_method: StartMethod | None = None,
) -> BatchSizeResult:
    """Find the largest batch of one rank that fits in memory, and how fast each size is.

    The size doubles until it does not fit; then the space between is halved, until the largest is
    known to a sixteenth. Each trial trains a few steps from the start, in processes of its own
    that are killed afterwards, so that all memory is free again. On several devices it has as
    many ranks as the run, in its layout; without memory on one of them a size does not fit, and
    the others do not wait for it. Without a launcher this process starts the ranks; under torchrun
    every rank calls this, and all get the same result.

    Nothing is written, and nothing of ``config`` changes; its callbacks run, since they can hold
    memory, its loggers and validation do not. A window of several batches is tried with two, so
    that gradients are kept from one batch to the next; ``global_batch_size`` does not count.

    On a CPU under Linux a process that wants more than what is free gets an error; elsewhere the
    system may become slow, so give ``max_size``.

    Args:
        make_trainer: the trainer's class, or any function from a configuration to a trainer.
        config: of the run.
        field: dotted name of the field that is the number of samples in a batch of one rank.
        mode: ``"binsearch"``, or ``"power"`` for the doubling alone.
        start: the first size; None is the configuration's. If it does not fit, smaller ones
            follow.
        max_size: none is larger; None goes on to the end of memory, or of the data.
        steps: optimizer steps of a trial, at least 2. The first one does not count for the speed.
        memory_limit: bytes that a process on a CPU may have beside what it starts with; None is
            its share of what is free.
        tell: given a line after every trial; None for silence.
        timeout_seconds: what a trial may take.
        start_method: how processes start, as for `verify_resume`. A fork has one thread, so on a
            CPU ``"spawn"`` measures the speed of the run.

    Returns:
        All trials, the largest size that fits, and the size from which more brings little.

    Raises:
        ConfigError: an argument, or the configuration, cannot work; or no size fits.
        Exception: what a trial raises that is not about memory.
        RuntimeError: a process died, or a trial was not done in time.
    """
    # Here, because finding a learning rate needs none of it.
    from dream_trainer.tuning.trial_run import TrialJob, available_memory
    from dream_trainer.tuning.trials import Trials, worst

    first = _require(config, field, mode, start, max_size, steps)
    method = start_method if start_method is not None else default_start_method()
    made: list[Trial] = []
    with tempfile.TemporaryDirectory(prefix="find-batch-size-") as folder:
        trials = Trials(config.device_parameters, Path(folder), method, timeout_seconds)
        limit = None
        if _is_on_cpu(config.device_parameters):
            free = available_memory()
            limit = memory_limit or (None if free is None else free // trials.ranks_here)
        search = sizes_to_try(first, mode, max_size)
        size: int | None = next(search, None)
        largest: int | None = None
        while size is not None:
            tried = with_field(_for_trial(config, folder, steps), field, size)
            job = TrialJob(make_trainer, tried, size, steps, field, limit)
            trial = Trial.of(size, worst(trials.run(job)))
            made.append(trial)
            if tell is not None and trials.rank == 0:
                tell(str(trial))
            try:
                size = search.send(trial.fits)
            except StopIteration as end:
                size, largest = None, end.value
    if largest is None:
        raise ConfigError(
            "find_batch_size",
            [f"{one.size} does not fit: {one.text or one.outcome}" for one in made],
            "Shard the model, checkpoint activations, or use another precision or device.",
        )
    return BatchSizeResult(field, first, tuple(made))


def _for_trial(config: Config, folder: str, steps: int) -> Config:
    """A copy of a configuration for a few steps that leave nothing behind."""
    made = copy.copy(config)
    limits = config.training_parameters
    accumulates = limits.global_batch_size is not None or limits.gradient_accumulation_steps > 1
    made.training_parameters = steps_alone(
        limits,
        steps,
        # Enough of them for the steps; some callbacks begin at a fraction of their number.
        n_epochs=None if limits.n_epochs is None else max(limits.n_epochs, steps),
        train_steps_per_epoch=None,
        global_batch_size=None,
        gradient_accumulation_steps=2 if accumulates else 1,
    )
    made.checkpoint_parameters = nothing_on_disk(config.checkpoint_parameters)
    made.callbacks = {**config.callbacks, **dict.fromkeys(DEFAULT_CALLBACKS)}
    made.loggers = {}
    made.root_dir = folder
    made.experiment = config.experiment or "find-batch-size"
    made.seed = 0 if config.seed is None else config.seed
    return made


def _is_on_cpu(devices: DeviceParameters) -> bool:
    if devices.accelerator != "auto":
        return devices.accelerator == "cpu"
    # By their number: asking for more would make this process unfit to fork.
    return torch.cuda.device_count() == 0 and not torch.backends.mps.is_available()


def _require(
    config: object, field: str, mode: str, start: int | None, max_size: int | None, steps: int
) -> int:
    """The first size.

    Raises:
        ConfigError: with all that is wrong.
    """
    if not isinstance(config, BaseTrainerConfig):
        raise ConfigError("find_batch_size", [f"{type(config).__name__} is no BaseTrainerConfig"])
    configured = field_value(config, field)
    problems = [
        f"{name}={value!r} is not a whole number of {least} or more"
        for name, value, least in (
            (f"start (or {field})", configured if start is None else start, 1),
            ("max_size", 1 if max_size is None else max_size, 1),
            ("steps", steps, _FEWEST_STEPS),
        )
        if not isinstance(value, int) or isinstance(value, bool) or value < least
    ]
    if mode not in ("power", "binsearch"):
        problems.append(f"mode={mode!r} is neither 'power' nor 'binsearch'")
    if problems:
        raise ConfigError("find_batch_size", problems)
    return int(configured if start is None else start)
