"""A callback that writes down what it is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from dream_trainer.callbacks import HOOKS, Callback


class Call(NamedTuple):
    """A hook that was called, and where the run was."""

    hook: str
    step: int
    epoch: int
    batch_idx: int | None


class RecordingCallback(Callback):
    """Writes down every hook, in order.

    Attributes:
        calls: the hooks' names.
        places: the hooks with step, epoch and batch.
    """

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.places: list[Call] = []


def _record(hook: str) -> Callable[..., None]:
    def method(self: RecordingCallback, trainer: Any, *arguments: Any) -> None:
        self.calls.append(hook)
        index = next((one for one in arguments if type(one) is int), None)
        self.places.append(Call(hook, trainer.global_step, trainer.current_epoch, index))

    return method


for _hook in HOOKS:
    setattr(RecordingCallback, _hook, _record(_hook))
