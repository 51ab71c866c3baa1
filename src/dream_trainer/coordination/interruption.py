"""Requests to stop, from a signal or from the program, that all ranks follow at the same place."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterable

from dream_trainer.coordination.agreement import StopAgreement, StopRequest
from dream_trainer.coordination.messages import end_process, tell
from dream_trainer.coordination.signals import SignalWatch

PREEMPTED = 143
"""Exit status of a run that a scheduler ended: 128 + SIGTERM, whatever the signal was."""


class Interrupted(SystemExit, KeyboardInterrupt):
    """Ctrl-C ended the run between two batches: its state is whole and may be saved.

    A program that does not catch it ends with status 130; of a mere subclass of
    ``KeyboardInterrupt`` Python would print the traceback and end with 1.
    """

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGINT)


class Preempted(SystemExit):
    """A scheduler ended the run between two batches: its state is whole and may be saved.

    A program that does not catch it ends with status 143.

    Attributes:
        signal_name: ``"SIGTERM"``, for example; on every rank that of the one that got it.
    """

    def __init__(self, signal_name: str) -> None:
        self.signal_name = signal_name
        super().__init__(PREEMPTED)


class Interruption:
    """Lets the batch under way end before a signal, or `stop` on any rank, ends the run.

    Args:
        agreement: what the ranks agree on a place with.
        preemption_signals: names of the signals by which a scheduler asks for the end.
        grace_seconds: time from such a signal to the end of the process; None is no limit.
        is_pointless: whether the run ends anyway, asked in a thread when a signal comes.
        clock: seconds from any start.
    """

    def __init__(
        self,
        agreement: StopAgreement,
        preemption_signals: Iterable[str] = ("SIGTERM", "SIGUSR1"),
        grace_seconds: float | None = None,
        is_pointless: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._agreement, self._grace = agreement, grace_seconds
        self._is_pointless = is_pointless
        numbers = [signal.Signals[name] for name in preemption_signals]
        self._signals = SignalWatch(numbers, self._heard, self._end, clock)
        self._due: StopRequest | None = None
        self.stop_reason: str | None = None
        self.deadline_signal: str | None = None
        """The scheduler's signal after which the time to the end is limited; None before it."""

    def __enter__(self) -> Interruption:
        self._due = self.stop_reason = self.deadline_signal = None
        self._agreement.on_request = self._start_deadline
        self._signals.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._signals.__exit__(*error)

    def stop(self, reason: str) -> None:
        """Ask all ranks to end the run; one of them is enough."""
        self._agreement.ask(StopRequest("stop", reason))

    def settle(self) -> None:
        """Count a place at which `stop` may take effect. On every rank, as often, in order."""
        if self._signals.has_caught:
            self._signals.settle()
        request = self._agreement.tick()
        if request is not None:
            self._take(request)

    def check(self) -> None:
        """Count a place at which the run may end, as `settle` does.

        Raises:
            Interrupted: on every rank at the same place, if Ctrl-C was pressed.
            Preempted: likewise, if a scheduler's signal came.
        """
        # As `settle` does, without another call: this is in every step.
        if self._signals.has_caught:
            self._signals.settle()
        request = self._agreement.tick()
        if request is not None:
            self._take(request)
        if self._due is not None:
            if self._due.kind == "interrupt":
                raise Interrupted
            raise Preempted(self._due.reason)

    def _take(self, request: StopRequest) -> None:
        if request.kind == "stop":
            self.stop_reason = self.stop_reason or request.reason
        else:
            self._due = request

    def _heard(self, number: signal.Signals) -> None:
        if number != signal.SIGINT and self._is_pointless():
            return  # a launcher that has lost one rank sends it to the others
        is_ctrl_c = number == signal.SIGINT
        request = StopRequest("interrupt" if is_ctrl_c else "preempt", number.name)
        # Here, too: an earlier request, `stop` for example, may be what the ranks agree on.
        self._start_deadline(request)
        if self._agreement.ask(request):
            # A terminal and a scheduler send it to every rank.
            what = "once more stops at once" if is_ctrl_c else self._told_grace
            tell(f"\n{number.name}: stopping after this batch; {what}")

    @property
    def _told_grace(self) -> str:
        return "no time limit" if self._grace is None else f"within {self._grace:g} s"

    def _start_deadline(self, request: StopRequest) -> None:
        if request.kind == "preempt" and self._grace is not None:
            self.deadline_signal = request.reason
            self._signals.end_in(self._grace, PREEMPTED)

    def _end(self, status: int) -> None:
        """No place to stop was reached in time. What was committed last is what counts."""
        if status == PREEMPTED:
            tell(
                f"not at a place to stop within grace_seconds={self._grace:g}: the last "
                "checkpoint is what the run goes on from"
            )
        end_process(status)
