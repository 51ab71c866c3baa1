"""EarlyStopping: ends a run whose monitored value says that going on is pointless."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from dream_trainer.callbacks.callback import Callback
from dream_trainer.errors import ConfigError

if TYPE_CHECKING:
    from dream_trainer.trainer.base import BaseTrainer


class EarlyStopping(Callback):
    """Ends the run when a value has not got better for some time, or is past a threshold.

    It looks after each validation of the run; at a value that begins with ``train/``, the mean
    over a training epoch, after the training part of each epoch.

    A run that was stopped stays so when it is started again. It goes on if what it is started
    with would not have stopped it: a larger ``patience``, another threshold.

    Args:
        monitor: name of a validation result, or ``train/`` and a name.
        mode: whether it is to fall (``"min"``) or to rise (``"max"``).
        patience: how many looks in a row may bring nothing better; the last of them ends the run.
        min_delta: how much counts as better, in the unit of the value itself.
        stopping_threshold: a value that is better than this is good enough.
        divergence_threshold: a value that is worse than this is hopeless.
        check_finite: whether NaN or infinity ends the run; else they bring nothing better.

    Attributes:
        best: the best value so far; None before the first.
        waited: looks since then.

    Raises:
        ConfigError: with all problems of the values at once.
    """

    def __init__(
        self,
        monitor: str = "val/loss",
        mode: Literal["min", "max"] = "min",
        patience: int = 3,
        *,
        min_delta: float = 0.0,
        stopping_threshold: float | None = None,
        divergence_threshold: float | None = None,
        check_finite: bool = True,
    ) -> None:
        problems = []
        if mode not in ("min", "max"):
            problems.append(f'mode={mode!r} is neither "min" nor "max"')
        if type(patience) is not int or patience < 1:
            problems.append(f"patience={patience!r} is not a whole number above 0")
        if not 0.0 <= min_delta < math.inf:
            problems.append(f"min_delta={min_delta!r} is not a number from 0")
        if problems:
            raise ConfigError("EarlyStopping", problems)
        self.monitor, self.mode, self.patience = monitor, mode, patience
        self.min_delta = min_delta
        self.stopping_threshold = stopping_threshold
        self.divergence_threshold = divergence_threshold
        self.check_finite = check_finite
        self.best: float | None = None
        self.waited = 0
        self._last: float | None = None
        self._reason: str | None = None

    def post_setup(self, trainer: BaseTrainer) -> None:
        """Ask for the value. Another trainer may have had this callback."""
        self.best = self._last = self._reason = None
        self.waited = 0
        trainer.monitored.watch(self.monitor)

    def pre_fit(self, trainer: BaseTrainer) -> None:
        """Let a run go on that this has stopped, if it would not stop it now.

        Raises:
            ConfigError: the value never comes.
        """
        if not self._is_of_training and trainer.val_dataloader is None:
            raise ConfigError(
                "EarlyStopping",
                [f"monitor={self.monitor!r} is a validation result, and val_dataloader is None"],
                'Return a loader for it, or monitor="train/loss".',
            )
        is_mine = self._reason is not None and trainer.stop_reason == self._reason
        if is_mine and self._verdict() is None:
            trainer.stop_reason = None
        if trainer.stop_reason is None:
            self._reason = None

    def post_validation_epoch(self, trainer: BaseTrainer, results: Mapping[str, float]) -> None:
        """Look at a result of the validation."""
        if trainer.is_fitting and not self._is_of_training:
            self._look(trainer)

    def post_train_epoch(self, trainer: BaseTrainer) -> None:
        """Look at a mean over the epoch."""
        if self._is_of_training:
            self._look(trainer)

    def state_dict(self) -> dict[str, Any]:
        """What it has seen."""
        return {
            "best": self.best,
            "waited": self.waited,
            "last": self._last,
            "reason": self._reason,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.best, self.waited = state_dict["best"], state_dict["waited"]
        self._last, self._reason = state_dict["last"], state_dict["reason"]

    @property
    def _is_of_training(self) -> bool:
        return self.monitor.startswith("train/")

    def _look(self, trainer: BaseTrainer) -> None:
        value = trainer.monitored.value(self.monitor, "EarlyStopping")
        self._last = value
        if self._is_better(value, self.best, self.min_delta):
            self.best, self.waited = value, 0
        else:
            self.waited += 1
        self._reason = self._verdict()
        if self._reason is not None:
            trainer.stop(self._reason)

    def _verdict(self) -> str | None:
        """Why the run is to end after what was seen last; None if it is not."""
        value, name = self._last, self.monitor
        assert value is not None
        if self.check_finite and not math.isfinite(value):
            return f"{name} is {value}"
        enough, hopeless = self.stopping_threshold, self.divergence_threshold
        if enough is not None and self._is_better(value, enough):
            return f"{name} is {value:.6g}, better than {enough:g}"
        if hopeless is not None and self._is_better(hopeless, value):
            return f"{name} is {value:.6g}, worse than {hopeless:g}"
        if self.waited >= self.patience:
            kind = "epoch" if self._is_of_training else "validation"
            looks = f"{self.waited} {kind}{'s' if self.waited > 1 else ''}"
            if self.best is None:
                return f"{name} has not been a number in {looks}"
            by = f"{self.min_delta:g} better" if self.min_delta else "better"
            return f"{name} has not got {by} than {self.best:.6g} in {looks}"
        return None

    def _is_better(self, value: float, than: float | None, by: float = 0.0) -> bool:
        if than is None:
            return not math.isnan(value)
        return value < than - by if self.mode == "min" else value > than + by
