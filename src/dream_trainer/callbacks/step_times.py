"""StepTimes: where the time of a step goes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from dream_trainer.callbacks.callback import Callback
from dream_trainer.callbacks.checkpoint import CheckpointCallback
from dream_trainer.callbacks.phase_times import PhaseClock, PhaseTime, StepSpreads, as_table
from dream_trainer.errors import ConfigError

if TYPE_CHECKING:
    from dream_trainer.trainer.base import BaseTrainer


class StepTimes(Callback):
    """Tells how long steps wait for the loader, compute, validate, save and so on.

    A table of means and 95th percentiles is printed when the run ends, however it ends. Loggers get
    ``time/loader`` and so on, in seconds a step, meant over the steps since the last ones;
    ``metrics.jsonl`` gets nothing, since no two runs take the same time. A step is all from the end
    of the one before it: the wait for its batches, and the validation and the save that the step
    before it has caused.

    The host's clock is read about twenty times a step. Work on an accelerator goes on behind the
    host, and counts where the host has to wait for it, in ``save`` or where a loss is read for
    example. With ``synchronize`` the host waits at every change of phase: each phase then has its
    own time, and the step takes longer than it would otherwise.

    Args:
        synchronize: wait for the accelerator at every change of phase.
        log_every_n_steps: steps between two rows for the loggers; None gives them none.
        skip: first steps of this process that are not counted: compilation, memory that is
            allocated for the first time.
        num_steps: steps that are counted after those; None is all of them.
        print_table: whether to print it; it is in ``summary`` all the same.

    Attributes:
        summary: the phases and, last, the whole step; filled when the run ends.

    Raises:
        ConfigError: a number that cannot work.
    """

    def __init__(
        self,
        *,
        synchronize: bool = False,
        log_every_n_steps: int | None = 50,
        skip: int = 1,
        num_steps: int | None = None,
        print_table: bool = True,
    ) -> None:
        problems = []
        if log_every_n_steps is not None and log_every_n_steps < 1:
            problems.append(f"log_every_n_steps is {log_every_n_steps}, and must be above 0")
        if skip < 0:
            problems.append(f"skip is {skip}, and must not be below 0")
        if problems:
            raise ConfigError("StepTimes", problems)
        self.synchronize, self.log_every_n_steps = synchronize, log_every_n_steps
        self.skip, self.num_steps, self.print_table = skip, num_steps, print_table
        self.summary: list[PhaseTime] = []
        self._spreads, self._recent = StepSpreads(), StepSpreads()
        self._clock: PhaseClock | None = None
        self._num_skipped, self._last_step = 0, -1
        self._undo = ExitStack()

    def pre_fit(self, trainer: BaseTrainer) -> None:
        """Begin to count."""
        self._spreads, self._recent, self.summary = StepSpreads(), StepSpreads(), []
        self._num_skipped, self._last_step = 0, trainer.global_step
        clock = PhaseClock(trainer.world.synchronize if self.synchronize else None)
        self._clock = clock
        trainer.place.observe(clock.enter)

        def around(hook: str, call: Callable[..., Any]) -> Callable[..., Any]:
            method = inspect.unwrap(call)  # another StepTimes may be around it
            saves = isinstance(getattr(method, "__self__", None), CheckpointCallback)
            return clock.around("save" if saves else "callbacks", call)

        trainer.callbacks.surround(around)
        self._undo.callback(trainer.callbacks.surround, None)
        self._undo.callback(trainer.place.observe, None)
        if trainer.moves_batches:
            own, name = vars(trainer), "batch_to_device"
            before = {name: own[name]} if name in own and not _is_around(own[name]) else {}
            own[name] = clock.around("to device", trainer.batch_to_device)

            def restore() -> None:
                if _is_around(own.get(name)):  # that of any StepTimes: all end together
                    del own[name]
                    own.update(before)

            self._undo.callback(restore)

    def on_boundary(self, trainer: BaseTrainer) -> None:
        """Take the times of the step."""
        step = trainer.global_step
        if self._clock is None or step == self._last_step:
            return
        seconds, steps = self._clock.take(), step - self._last_step
        self._last_step = step
        if self._num_skipped < self.skip:
            self._num_skipped += 1
            return
        if self.num_steps is not None and self._spreads.num_steps >= self.num_steps:
            return
        if steps > 1:  # of one batch: each has its share
            seconds = {phase: one / steps for phase, one in seconds.items()}
        for _ in range(steps):
            self._spreads.add(seconds)
            self._recent.add(seconds)
        every = self.log_every_n_steps
        if every is not None and self._recent.num_steps >= every:
            self._log(trainer)

    def post_fit(self, trainer: BaseTrainer) -> None:
        """Compare the ranks, a collective, and print the table."""
        ranks = trainer.world.all_gather_object(self._spreads.means())
        self.summary = self._spreads.summary(ranks if len(ranks) > 1 else ())
        self._print(trainer)

    def on_interrupt(self, trainer: BaseTrainer) -> None:
        """Print what this rank knows."""
        self._print_own(trainer)

    def on_exception(self, trainer: BaseTrainer, exception: BaseException) -> None:
        """Print what this rank knows."""
        self._print_own(trainer)

    def close(self, trainer: BaseTrainer) -> None:
        """Count no more."""
        self._clock = None
        self._undo.close()

    def _print_own(self, trainer: BaseTrainer) -> None:
        # The others may never come to a collective.
        if self._clock is not None:
            self.summary = self._spreads.summary()
            self._print(trainer)

    def _print(self, trainer: BaseTrainer) -> None:
        if not self.print_table:
            return
        kind = trainer.world.device.type
        how = (
            "" if kind == "cpu" else ", synchronized" if self.synchronize else ", as the host waits"
        )
        steps = f"{self._spreads.num_steps} steps on {kind}{how}"
        trainer.world.print(as_table(self.summary, f"where the time of a step goes, over {steps}"))

    def _log(self, trainer: BaseTrainer) -> None:
        recent, self._recent = self._recent, StepSpreads()
        if trainer.world.is_global_zero:
            values = {f"time/{p.replace(' ', '_')}": one for p, one in recent.means().items()}
            for logger in trainer.loggers.values():
                logger.log_metrics(values, step=trainer.global_step)


def _is_around(function: object) -> bool:
    return hasattr(function, "__wrapped__")
