"""A few steps of a trainer in a process of its own, which tells how they went."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.utils.data import IterableDataset

from dream_trainer.callbacks import Callback
from dream_trainer.coordination import RankFailedError
from dream_trainer.coordination.failure import is_left_alone
from dream_trainer.errors import ConfigError
from dream_trainer.verification.processes import Failure, begin, received

if TYPE_CHECKING:
    from dream_trainer.trainer.base import BaseTrainer

Outcome = Literal["fits", "out_of_memory", "more_than_the_data", "failed"]
_NAME = "batch_size_trial"
#: How memory that is not there is called, beside torch.OutOfMemoryError: by the CPU's allocator,
#: by libraries of CUDA, and by a loader whose worker the system has killed.
_WORDS = (
    "defaultcpuallocator",
    "not enough memory",
    "out of memory",
    "alloc_failed",
    "killed by signal: killed",
)


@dataclass(frozen=True)
class RankOutcome:
    """How a trial went on one rank."""

    outcome: Outcome
    text: str = ""
    seconds: float = 0.0
    """Of the steps that count."""
    samples: float = 0.0
    """Handed out in them, over all ranks."""
    memory: int = 0
    """Bytes at the peak: reserved on the device, or of the process on a CPU."""
    failure: Failure | None = None
    is_consequence: bool = False
    """Whether it can come from another rank's end."""


@dataclass(frozen=True)
class TrialJob:
    """What a process needs for a trial."""

    make_trainer: Callable[[Any], Any]
    config: Any
    size: int
    """That the configuration asks for."""
    steps: int
    field: str
    memory_limit: int | None
    """Bytes that a process may have beside what it began with; None for no limit."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that there was not enough memory, on a device or a CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(word in text for word in _WORDS)


def run_trial(
    job: Any, environment: Mapping[str, str], pipe: Any, output: Path, parent: int
) -> None:  # pragma: no cover - in another process
    """Fit until enough is known, tell it, and wait to be killed."""
    begin(parent, output)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is asked, and ends this
    os.environ.update(environment)

    def tell(outcome: RankOutcome) -> None:
        pipe.send(outcome)
        while True:  # ranks that end by themselves disturb the others
            signal.pause()

    trainer = None
    try:
        job = received(job)
        if job.memory_limit is not None:
            _limit_memory(job.memory_limit)
        trainer = job.make_trainer(job.config)
        _watch(trainer, _Observer(job, tell))
        trainer.fit()
        raise RuntimeError(f"the run was over before {job.steps} optimizer steps")
    except BaseException as error:  # noqa: BLE001 - the parent raises it
        tell(_outcome_of(error, trainer))


def _watch(trainer: Any, observer: Callback) -> None:
    if getattr(trainer.world, "starts_functions", False):
        raise ConfigError(
            "device_parameters",
            ["this strategy starts ranks by itself, and a trial has started them already"],
            "Leave strategy out, or name one that does not fork or spawn.",
        )
    # No validation is there to steer by, and what is measured does not depend on how well it goes.
    vars(trainer).update(
        stop=_go_on, named_schedulers=_no_schedulers, named_schedules=_no_schedulers
    )
    trainer.callbacks = trainer.callbacks.followed_by(_NAME, observer)


def _go_on(reason: str) -> None:
    pass


def _no_schedulers() -> dict[str, Any]:
    return {}


def _outcome_of(error: BaseException, trainer: Any) -> RankOutcome:
    if is_out_of_memory(error):
        return RankOutcome("out_of_memory", str(error).partition("\n")[0])
    if isinstance(error, ConfigError) and _has_no_batches(trainer):
        return RankOutcome("more_than_the_data", str(error).partition("\n")[0])
    is_consequence = isinstance(error, RankFailedError) or is_left_alone(error)
    return RankOutcome(
        "failed",
        f"{type(error).__name__}: {error}",
        failure=Failure.of(error),
        is_consequence=is_consequence,
    )


def _has_no_batches(trainer: Any) -> bool:
    """Whether ``drop_last`` leaves nothing of the data."""
    with suppress(Exception):  # made or not, of any kind
        return bool(trainer.train_dataloader.num_batches == 0)
    return False


class _Observer(Callback):
    """Takes time and memory; the first step, which makes the optimizer's state, does not count.

    Args:
        job: what is tried.
        tell: given the outcome; does not return.
    """

    def __init__(self, job: TrialJob, tell: Callable[[RankOutcome], None]) -> None:
        self._job, self._tell = job, tell
        self._start, self._samples, self._last_step = 0.0, 0, 0

    def pre_fit(self, trainer: BaseTrainer) -> None:
        loader, size = trainer.loop.train_loader, self._job.size
        if loader.batch_size not in (None, size):
            raise ConfigError(
                "field",
                [
                    f"with {self._job.field}={size} the train loader gives batches of "
                    f"{loader.batch_size}, so that field is not their size"
                ],
                "Name the field of the configuration that is the batch size of one rank.",
            )
        length, ranks = loader.length, trainer.world.dp_size
        is_counted = not isinstance(loader.dataset, (IterableDataset, type(None)))
        if is_counted and length is not None and length < size * ranks:
            text = f"{length} samples for {ranks} x {size}"
            self._tell(RankOutcome("more_than_the_data", text))

    def post_train_step(
        self, trainer: BaseTrainer, result: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._last_step > 0:
            given = trainer.loop.train_loader.num_samples
            self._samples += self._job.size if given is None else given

    def on_boundary(self, trainer: BaseTrainer) -> None:
        step = trainer.global_step
        if step == self._last_step:
            return  # the end of an epoch
        if self._last_step == 0:
            trainer.world.synchronize()
            self._start = time.perf_counter()
        self._last_step = step
        if step < self._job.steps:
            return
        trainer.world.synchronize()
        seconds = time.perf_counter() - self._start
        trainer.world.barrier()  # the others' steps are over, too
        self._tell(
            RankOutcome(
                "fits",
                seconds=seconds,
                samples=float(self._samples * trainer.world.dp_size),
                memory=_peak_memory(trainer.world.device),
            )
        )


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_reserved(device))
    import resource  # not everywhere

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts KiB


def _limit_memory(more: int) -> None:
    """Let an allocation fail in this process, before the system kills another one for it."""
    import resource

    with suppress(OSError, ValueError):
        held = _kibibytes("/proc/self/status", "VmData:") * 1024
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (held + more, hard))


def _kibibytes(path: str, name: str) -> int:
    for line in Path(path).read_text(encoding="ascii").splitlines():
        if line.startswith(name):
            return int(line.split()[1])
    raise OSError(f"no {name} in {path}")


def available_memory() -> int | None:
    """Bytes of the machine, or of the container, that nobody uses; None if it cannot be told."""
    try:
        left = _kibibytes("/proc/meminfo", "MemAvailable:") * 1024
    except OSError:
        return None
    group = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):  # no container, or "max"
        limit = int((group / "memory.max").read_text(encoding="ascii"))
        left = min(left, limit - int((group / "memory.current").read_text(encoding="ascii")))
    return max(left, 0)
