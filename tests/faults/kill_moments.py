"""Moments at which a run kills itself with SIGKILL.

A moment is written ``NAME:N`` or ``NAME:N:RANK``: the N-th time that NAME is reached in the
process of that rank (0 if it is left out, ``*`` for every rank). NAME is one of

    a hook of Callback      post_optimizer_step:4
    step                    step:4        right after optimizer step 4 of the run, before its save
    a name in ``PLACES``    after-rename:2
    in-save, in-restore     in-save:5000  the N-th call or return of any function, Python or C,
                                          on a thread that is inside a save, or inside a restore
    stalled-save            as in-save, but that thread stands still for a while before the kill,
                            so that the training gets as far ahead of it as it can
    file                    file:120      right before the N-th change of a file of the run

The last four are reached a little more or less often from run to run, since threads take turns; a
run with fewer than N is killed at its end.
"""

from __future__ import annotations

import importlib
import itertools
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from dream_trainer.callbacks import Callback
from dream_trainer.callbacks.callback import HOOKS

#: Name -> (module, what to wrap, whether the call is still made).
PLACES = {
    "before-files": ("dream_trainer.storage.directory", "write_tree", False),
    "after-files": ("dream_trainer.storage.directory", "write_tree", True),
    "after-manifest": ("dream_trainer.storage.manifest", "Manifest.write", True),
    "after-rename": ("dream_trainer.storage.directory", "fsync_directory", False),
    "before-delete": ("shutil", "rmtree", False),
    "after-delete": ("shutil", "rmtree", True),
    "before-log": ("dream_trainer.loggers.jsonl", "JsonlLog.write", False),
    "after-log": ("dream_trainer.loggers.jsonl", "JsonlLog.write", True),
    "after-cut": ("dream_trainer.loggers.jsonl", "JsonlLog.resume", True),
}
#: Functions that a save or a restore is made of, whatever thread they run on.
INSIDE = {
    "in-save": (
        ("dream_trainer.checkpointing", "Checkpointer.save"),
        ("dream_trainer.checkpointing", "CheckpointStore.prune"),
        ("dream_trainer.storage", "StagedState.copy"),
        ("dream_trainer.storage", "StagedState.release"),
        ("dream_trainer.storage", "save_directory"),
    ),
    "in-restore": (
        ("dream_trainer.trainer.restore", "restore"),
        ("dream_trainer.trainer.restore", "open_run_directory"),
    ),
}
INSIDE["stalled-save"] = INSIDE["in-save"]
_STALL_SECONDS = 0.05
_CHANGES = {
    *("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"),
    *("os.link", "os.symlink", "shutil.rmtree", "shutil.move"),
}


class Trigger:
    """Counts events; the ``number``-th kills the process, 0 none.

    Args:
        number: counted from 1.
        report: file that is told where the process was when it was killed.
        stall: seconds that the thread of the event stands still before the kill.
        strikes_at_end: kill a run that ends before there were so many.
    """

    def __init__(
        self, number: int, report: Path, stall: float = 0.0, strikes_at_end: bool = False
    ) -> None:
        self._number, self._report = number, report
        self._stall, self._strikes_at_end = stall, strikes_at_end
        self._events = itertools.count(1)  # its next() is one step for all threads
        self._pid = os.getpid()
        self.marks: list[int] = []

    def event(self) -> None:
        if next(self._events) == self._number and os.getpid() == self._pid:
            self.strike()

    def strike(self) -> None:
        self._number = 0  # the report's own events are none
        thread = threading.current_thread().name
        self._report.write_text(f"{thread}\n" + "".join(traceback.format_stack()[-9:-2]))
        if self._stall:
            time.sleep(self._stall)
        os.kill(os.getpid(), signal.SIGKILL)

    def mark(self) -> None:
        """An event whose number is remembered."""
        self.marks.append(next(self._events))
        if self.marks[-1] == self._number and os.getpid() == self._pid:
            self.strike()

    def end(self) -> None:
        """The run is over: the last mark, and the last chance to strike."""
        self.mark()
        if self._strikes_at_end and self._number:
            self.strike()


def arm(moment: str, run_directory: Path, report: Path) -> tuple[Trigger, dict[str, Callback]]:
    """Set the trap in this process.

    Returns:
        The trigger, and callbacks to give to the run.
    """
    name, number, rank = [*moment.split(":"), "0"][:3]
    is_mine = rank in ("*", os.environ.get("RANK", "0"))
    stall = _STALL_SECONDS if name == "stalled-save" else 0.0
    is_counted = name in INSIDE or name == "file"
    trigger = Trigger(int(number) if is_mine else 0, report, stall, strikes_at_end=is_counted)
    if name in HOOKS:
        hook = {name: lambda *_: trigger.event()}
        return trigger, {"kills": type("Kills", (Callback,), hook)()}
    if name == "step":
        return trigger, {"kills": _KillsAtStep(trigger, int(number), is_mine)}
    if name in INSIDE:
        _watch_calls(trigger, [getattr(*_find(*place)) for place in INSIDE[name]])
    elif name == "file":
        _watch_files(trigger, run_directory)
    else:
        module, path, is_called = PLACES[name]
        _wrap(trigger, *_find(module, path), is_called)
    return trigger, {}


class _KillsAtStep(Callback):
    def __init__(self, trigger: Trigger, step: int, is_mine: bool) -> None:
        self._trigger, self._step, self._is_mine = trigger, step, is_mine

    def post_optimizer_step(self, trainer: Any, optimizer: Any) -> None:
        if self._is_mine and trainer.global_step == self._step:
            self._trigger.strike()


def _find(module: str, path: str) -> tuple[Any, str]:
    """The object that holds an attribute, and the attribute's name."""
    *owners, attribute = path.split(".")
    owner: Any = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    return owner, attribute


def _wrap(trigger: Trigger, owner: Any, attribute: str, is_called: bool) -> None:
    original = getattr(owner, attribute)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if is_called:
            result = original(*args, **kwargs)
            trigger.event()
            return result
        trigger.event()
        return original(*args, **kwargs)

    setattr(owner, attribute, wrapped)


def _watch_calls(trigger: Trigger, functions: list[Callable[..., Any]]) -> None:
    """Every call and return, also of C functions, under any of ``functions`` is an event."""
    # By code object: a name that some module imported cannot be wrapped in place.
    codes = {id(function.__code__) for function in functions}
    here = threading.local()

    def profile(frame: FrameType, event: str, _: Any) -> None:
        depth: int = getattr(here, "depth", 0)
        is_watched = id(frame.f_code) in codes
        if is_watched and event == "call":
            here.depth = depth = depth + 1
        if depth:
            trigger.event()
            if is_watched and event == "return":
                here.depth = depth - 1
                if depth == 1:
                    trigger.mark()

    threading.setprofile(profile)
    sys.setprofile(profile)


def _watch_files(trigger: Trigger, directory: Path) -> None:
    """Python's audit events come right before the system call that they tell of."""
    inside = str(directory.absolute())

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event not in _CHANGES:
            return
        # A tree is deleted by names relative to a descriptor: those have no path to look at.
        is_relative = event in ("os.remove", "os.rmdir") and args[-1] != -1
        if is_relative or any(str(a).startswith(inside) for a in args if _is_path(a)):
            trigger.event()

    sys.addaudithook(hook)


def _is_path(value: object) -> bool:
    return isinstance(value, (str, os.PathLike))
