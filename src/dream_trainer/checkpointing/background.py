"""A save that is written while the training goes on."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.optim import Optimizer

from dream_trainer.errors import CheckpointError
from dream_trainer.storage import StagedState, address

#: As `nice` counts, more than the process has. On a machine whose cores are all busy a tenth of one
#: is left for the save.
_NICENESS = 10

_under_way: WeakSet[BackgroundSave] = WeakSet()


def _wait_before_fork() -> None:
    """A fork copies locks that the writer holds, and nobody who would let go of them.

    A loader's worker that needs one would wait for ever.
    """
    for save in list(_under_way):
        save.join()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_wait_before_fork)


def _step_back() -> None:
    """Let the training go first: on as many threads as cores a save would slow its steps down."""
    if sys.platform == "linux":  # elsewhere a priority is that of a whole process
        with suppress(OSError):
            thread = threading.get_native_id()
            niceness = os.getpriority(os.PRIO_PROCESS, thread) + _NICENESS
            os.setpriority(os.PRIO_PROCESS, thread, min(niceness, 19))


class BackgroundSave:
    """Copies, then commits, in a thread of its own.

    The optimizers' next step waits for the copy, and for nothing else, whoever calls it.

    Args:
        staged: the copy that has begun.
        commit: writes it and returns, or raises, when that is done.
        optimizers: what changes the tensors that are still being copied.
        device: of this process.
    """

    def __init__(
        self,
        staged: StagedState,
        commit: Callable[[], object],
        optimizers: Iterable[Optimizer],
        device: torch.device,
    ) -> None:
        self.failure: CheckpointError | None = None
        self._staged, self._commit, self._device = staged, commit, device
        # No daemon: a program that ends, ends after its last checkpoint.
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=False)
        self._thread.start()
        _under_way.add(self)
        # A program that ends without asking must not end as if it were saved.
        atexit.register(self._tell)
        # After the start: if that fails, a step must not wait for a thread that never was.
        self._hooks = [one.register_step_pre_hook(self._before_step) for one in optimizers]

    @property
    def is_done(self) -> bool:
        """Whether it is committed, or has failed."""
        return not self._thread.is_alive()

    @property
    def is_torn(self) -> bool:
        """Whether it failed because the state changed while it was copied."""
        return self._staged.is_torn

    def finish_copy(self) -> None:
        """Return once what is copied may change, as the next step would wait for it."""
        self._staged.release()

    def join(self) -> None:
        """Return when it is done; the next step still waits for its copy, which is then there."""
        self._thread.join()
        _under_way.discard(self)

    def finish(self) -> None:
        """Return when it is done, and leave nothing behind."""
        atexit.unregister(self._tell)
        self._staged.release()
        self.join()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _run(self) -> None:
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)  # a thread begins with the first one
            self._staged.copy()
            _step_back()
            self._commit()
        except CheckpointError as error:
            self.failure = error
        except BaseException as error:  # noqa: BLE001 - a thread has nobody to raise it to
            self.failure = CheckpointError("checkpoint", [f"{type(error).__name__}: {error}"])

    def _tell(self) -> None:
        self._thread.join()
        if self.failure is not None:
            print(f"a checkpoint was not saved. {self.failure}", file=sys.stderr)

    def _before_step(self, *_: Any) -> None:
        self._staged.release()


def stepped_tensors(optimizers: Iterable[Optimizer]) -> set[int]:
    """Addresses of what only an optimizer's step changes: its parameters and their state."""
    return {
        address(tensor)
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
        for tensor in (parameter, *optimizer.state.get(parameter, {}).values())
        if isinstance(tensor, Tensor)
    }
