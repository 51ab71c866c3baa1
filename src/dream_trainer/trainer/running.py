"""What surrounds every run: settings put back, callbacks told, everything closed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from dream_trainer.interruption import Interrupted

if TYPE_CHECKING:
    from dream_trainer.trainer.base import BaseTrainer


@contextmanager
def running(trainer: BaseTrainer) -> Iterator[None]:
    """Run a block of a trainer; however it ends, nothing stays open.

    An exception reaches the caller as it was raised, after ``on_exception`` (``on_interrupt`` for
    Ctrl-C), with loggers closed and the process group left.
    """
    parameters = trainer.training_parameters
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(parameters.deterministic or was_deterministic)
    status = "failed"
    try:
        with torch.autograd.set_detect_anomaly(parameters.detect_anomaly):
            yield
        status = "success"
    except KeyboardInterrupt as interrupt:
        trainer.is_interrupted_between_batches = isinstance(interrupt, Interrupted)
        _guarded(trainer.callbacks.on_interrupt, trainer)
        raise
    except BaseException as error:
        _guarded(trainer.callbacks.on_exception, trainer, error)
        raise
    finally:
        torch.use_deterministic_algorithms(was_deterministic)
        _guarded(trainer.callbacks.close, trainer)
        _guarded(trainer.release)
        if trainer.is_fitting and trainer.world.is_global_zero:
            for logger in trainer.loggers.values():
                _guarded(partial(logger.finalize, status))
        trainer.is_fitting = False
        if status == "failed":
            trainer.world.close()


def _guarded(call: Callable[..., Any], *args: Any) -> None:
    """A second failure on the way out must not hide the first."""
    try:
        call(*args)
    except Exception as error:  # noqa: BLE001 - the first failure matters more
        warnings.warn(f"while closing: {type(error).__name__}: {error}", stacklevel=2)
