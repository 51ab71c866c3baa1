"""A few steps of a trainer under torch's profiler, and where their time goes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dream_trainer.callbacks.phase_times import PhaseTime, as_table
from dream_trainer.callbacks.profiler import Profiler
from dream_trainer.callbacks.step_times import StepTimes
from dream_trainer.inspection.throw_away import Answer, run_thrown_away

if TYPE_CHECKING:
    from dream_trainer.trainer.base import BaseTrainer, BaseTrainerConfig

_VIEWER = "https://ui.perfetto.dev"


@dataclass(frozen=True)
class ProfiledRun:
    """What a profiled run of a few steps has shown. ``str()`` is a report."""

    phases: tuple[PhaseTime, ...]
    """Where the time of a step goes, in the steps before those of the trace; the last is the whole
    step."""
    operations: str
    """The operations that took longest, as a table."""
    trace: Path
    """The file of this rank."""

    def __str__(self) -> str:
        steps = self.phases[-1].steps if self.phases else 0
        title = f"where the time of a step goes, over {steps} steps before those of the trace"
        return (
            f"{as_table(self.phases, title)}\n\n"
            f"the operations that took longest, in the steps of the trace\n{self.operations}\n"
            f"trace: {self.trace}\n"
            f"To look at it: open {_VIEWER} in a browser and drop the file there; it stays on this "
            "machine."
        )


def profile_run(
    make_trainer: Callable[[Any], BaseTrainer],
    config: BaseTrainerConfig,
    folder: str | Path,
    *,
    steps: int = 3,
    warmup: int = 15,
    synchronize: bool = False,
    record_shapes: bool = False,
    profile_memory: bool = False,
    with_stack: bool = False,
    num_rows: int = 15,
) -> ProfiledRun:
    """Profile some steps of a trainer, with its own loader and callbacks, and throw the run away.

    Nothing is read from the run directory or written to it, but for the files of the profile if
    ``folder`` is in it; there are no loggers and no validation. Every rank calls it.

    Args:
        make_trainer: a trainer class, or a function from a configuration to a trainer.
        config: what it is called with; it stays as it is.
        folder: where a trace a rank, and a table beside it, are written; nothing is overwritten.
        steps: optimizer steps in the trace.
        warmup: steps before them. All are timed by phase but the first three, and the last two,
            in which the profiler warms up.
        synchronize: wait for the accelerator at every change of phase while they are timed.
        record_shapes: see `Profiler`.
        profile_memory: see `Profiler`.
        with_stack: see `Profiler`.
        num_rows: operations in the table.

    Raises:
        ConfigError: a number cannot work, or the run ended before the steps of the trace.
    """
    profiler = Profiler(
        at_steps=[warmup],
        warmup=min(2, max(warmup, 0)),
        active=steps,
        record_shapes=record_shapes,
        profile_memory=profile_memory,
        with_stack=with_stack,
        folder=folder,
        num_rows=num_rows,
    )
    skip = min(3, max(warmup - profiler.warmup - 1, 0))
    times = StepTimes(
        synchronize=synchronize,
        log_every_n_steps=None,
        skip=skip,
        num_steps=max(warmup - profiler.warmup - skip, 0),
        print_table=False,
    )
    result: ProfiledRun = run_thrown_away(
        make_trainer,
        config,
        steps=warmup + steps,
        answer=_Reporter(profiler, times),
        callbacks={"inspected_times": times, "inspected_profile": profiler},
    )
    return result


class _Reporter(Answer):
    """Tells what the two others have found."""

    def __init__(self, profiler: Profiler, times: StepTimes) -> None:
        self._profiler, self._times = profiler, times

    def post_fit(self, trainer: BaseTrainer) -> None:
        """Nothing, if the run has ended before the trace."""
        for trace in self._profiler.traces:
            found = tuple(self._times.summary), self._profiler.operations
            self.tell(trainer, ProfiledRun(*found, trace.resolve()))
