"""The processes that one process starts: as copies of its command, or to run a function."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable
from multiprocessing.process import BaseProcess

from lightning.fabric import Fabric
from lightning.fabric.strategies import Strategy
from lightning.fabric.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.fabric.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

_SECONDS_TO_SAVE = 30.0
_SECONDS_AT_THE_END, _SECONDS_AFTER_A_FAILURE = 30.0, 8.0


class Children:
    """Copies of a command that Fabric's launcher has started; none under another launcher.

    At the end of this process it waits for them, so that nothing of a run outlives it. After a
    failure they are killed if they take longer than a few seconds.

    Args:
        strategy: launched.

    Attributes:
        are_to_end: whether the run has failed.
    """

    def __init__(self, strategy: Strategy) -> None:
        launcher = getattr(strategy, "launcher", None)
        self.are_to_end = False
        self._observed: list[subprocess.Popen[bytes]] = []
        if isinstance(launcher, _SubprocessScriptLauncher):
            self._observed = launcher.procs
        self._processes = list(self._observed)
        if self._processes:
            atexit.register(self._wait)

    def hold(self) -> None:
        """Keep them from Fabric's observer.

        It kills everybody, this process too, without a word about how a child ended.
        """
        self._observed.clear()

    def _wait(self) -> None:
        self.hold()
        seconds = _SECONDS_AFTER_A_FAILURE if self.are_to_end else _SECONDS_AT_THE_END
        deadline = time.monotonic() + seconds
        for child in self._processes:
            try:
                child.wait(max(deadline - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                # Otherwise it has work of its own, or waits for this process, whose end it notices.
                if self.are_to_end:
                    child.kill()
                    child.wait()


def starts_functions(strategy: Strategy) -> bool:
    """Whether a strategy forks or spawns its ranks to run a function."""
    return isinstance(getattr(strategy, "launcher", None), _MultiProcessingLauncher)


def spawns(strategy: Strategy) -> bool:
    """Whether these ranks are fresh processes that everything must be sent to."""
    launcher = getattr(strategy, "launcher", None)
    return starts_functions(strategy) and not getattr(launcher, "is_interactive_compatible", True)


def run_on_ranks(fabric: Fabric, function: Callable[[Fabric], None]) -> None:
    """Fork or spawn the ranks of a Fabric, run a function there, and wait for them.

    Raises:
        torch.multiprocessing.ProcessRaisedException: with the traceback of a rank that failed.
    """
    before, port = set(multiprocessing.active_children()), os.environ.get("MASTER_PORT")
    try:
        fabric.launch(function)
    except BaseException as error:
        ranks = set(multiprocessing.active_children()) - before
        _end(ranks, is_asked=isinstance(error, KeyboardInterrupt))
        raise
    finally:
        os.environ.pop("MASTER_PORT", None)
        if port is not None:
            os.environ["MASTER_PORT"] = port


def _end(ranks: Iterable[BaseProcess], *, is_asked: bool) -> None:
    try:
        for rank in ranks:
            # In a terminal Ctrl-C has reached them; a notebook's kernel gets it alone.
            if is_asked and rank.pid is not None and not os.isatty(0):
                os.kill(rank.pid, signal.SIGINT)
        deadline = time.monotonic() + _SECONDS_TO_SAVE * is_asked
        for rank in ranks:
            rank.join(max(deadline - time.monotonic(), 0))
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()


__all__ = ["Children", "run_on_ranks", "spawns", "starts_functions"]
