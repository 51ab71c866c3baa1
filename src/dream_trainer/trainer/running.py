"""What surrounds every run: settings put back, callbacks told, everything closed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from dream_trainer.coordination import Interrupted, Preempted, RankFailedError
from dream_trainer.coordination.slurm import requeue_slurm_job
from dream_trainer.randomness import all_preserved

if TYPE_CHECKING:
    from dream_trainer.trainer.base import BaseTrainer


@dataclass
class _End:
    """How a run ends on this rank."""

    status: str = "failed"
    is_together: bool = False
    """Whether all ranks come to this end at the same place."""


@contextmanager
def running(trainer: BaseTrainer) -> Iterator[None]:
    """Run a block of a trainer; however it ends, nothing stays open.

    An exception reaches the caller as it was raised, after ``on_exception`` (``on_interrupt`` for
    Ctrl-C and a scheduler's signal), with loggers closed and the process group left.

    Raises:
        RankFailedError: another rank failed, and this one could not go on without it.
        RuntimeError: the trainer is closed.
    """
    if trainer.is_closed:
        raise RuntimeError(
            "this trainer is closed. Make a new one: it continues from the last checkpoint."
        )
    parameters, world, end = trainer.training_parameters, trainer.world, _End()
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(parameters.deterministic or was_deterministic)
    trainer.is_running = True
    try:
        # Signals are requests to the very end: they must not kill a rank that the others need.
        with (
            all_preserved(),
            trainer.interruption,
            _parting(trainer, end),
            _closing(trainer, end),
            torch.autograd.set_detect_anomaly(parameters.detect_anomaly),
        ):
            if world.is_launched:
                trainer.watch.join(world)
            yield
    finally:
        torch.use_deterministic_algorithms(was_deterministic)


@contextmanager
def evaluating_inside(trainer: BaseTrainer) -> Iterator[None]:
    """Run a block that evaluates, asked for by a callback in the middle of `fit`.

    It is no part of the run: nothing that it draws, measures or logs is. A signal waits for its
    end, or the callback would not be called again when the run goes on.

    Raises:
        RuntimeError: something is under way that it would disturb.
    """
    if not (trainer.is_fitting and trainer.is_prepared):
        raise RuntimeError("this trainer is running; evaluate after it, or in a hook of fit")
    if trainer.is_in_step or trainer.loop.is_evaluating:
        raise RuntimeError(
            "an evaluation inside a training step or a validation would disturb it. Call it in "
            "post_validation_epoch, post_epoch or on_boundary."
        )
    trainer.is_fitting = trainer.loop.evaluations.may_end = False
    try:
        with all_preserved():
            yield
    finally:
        trainer.is_fitting = trainer.loop.evaluations.may_end = True


@contextmanager
def _closing(trainer: BaseTrainer, end: _End) -> Iterator[None]:
    """Tell the callbacks and the other ranks how the block ended; close what is open."""
    watch, world = trainer.watch, trainer.world
    try:
        yield
        end.status, end.is_together = "success", True
    except (KeyboardInterrupt, Preempted) as interrupt:
        is_between = isinstance(interrupt, (Interrupted, Preempted))
        trainer.is_interrupted_between_batches = is_between
        if not is_between:
            watch.fail(interrupt)  # this rank leaves the others in mid-step
        failed = _guarded(trainer.callbacks.on_interrupt, trainer)
        if failed is not None:
            watch.fail(failed)  # it leaves the others in a save that needs this rank
        end.is_together = is_between and failed is None
        raise
    except BaseException as error:
        first = watch.fail(error)
        _guarded(trainer.callbacks.on_exception, trainer, error)
        if first is not None and (name := trainer.interruption.deadline_signal) is not None:
            # The other rank's time was over a moment before this one's.
            raise Preempted(name) from error
        if first is not None:
            raise RankFailedError(first) from error
        raise
    finally:
        if trainer.is_fitting:
            trainer.streams.lay_aside()
        trainer.place.enter("end")
        _guarded(trainer.callbacks.close, trainer)
        _guarded(trainer.release)
        if trainer.is_fitting and world.is_global_zero:
            own = [id(one) for one in world.loggers]  # the Fabric's outlive the run
            for logger in (one for one in trainer.loggers.values() if id(one) not in own):
                _guarded(partial(logger.finalize, end.status))
        trainer.is_running = trainer.is_fitting = False


@contextmanager
def _parting(trainer: BaseTrainer, end: _End) -> Iterator[None]:
    """Leave the other ranks, who are told to come, too, if this one alone ends here."""
    world, watch = trainer.world, trainer.watch
    try:
        yield
    except Preempted as preempted:
        # SIGTERM is what scancel sends, too: such a job is to stay away.
        if world.is_global_zero and preempted.signal_name != "SIGTERM":
            requeue_slurm_job()
        raise
    finally:
        if not end.is_together:
            world.end_children()
            # Several ranks keep it: the group's end waits for its threads with Python's lock held,
            # as soon as a model that used it is gone, and they wait for that lock.
            if world.is_launched and world.size == 1:
                world.close()
        _guarded(watch.leave)
        if end.is_together:
            _guarded(world.end_side_groups)
        if end.status == "success":
            watch.require_all()  # one failed at the end, or froze


def _guarded(call: Callable[..., Any], *args: Any) -> Exception | None:
    """A second failure on the way out must not hide the first; it is given back."""
    try:
        call(*args)
    except Exception as error:  # noqa: BLE001 - the first failure matters more
        warnings.warn(f"while closing: {type(error).__name__}: {error}", stacklevel=2)
        return error
    return None
