"""How long and in what rhythm a run trains."""

from __future__ import annotations

import math
import signal
import sys
from dataclasses import dataclass, field
from typing import Literal

from dream_trainer.configs.numbers import is_count, not_a_share, not_above_zero, share_of
from dream_trainer.configs.quantities import OptionalDurationField, convert_durations
from dream_trainer.errors import ConfigError

_COUNTS = (
    "n_epochs",
    "max_steps",
    "gradient_accumulation_steps",
    "global_batch_size",
    "val_every_n_epochs",
    "val_every_n_steps",
    "max_skipped_in_a_row",
)
#: What a whole number counts; a fraction is of all of them in an epoch.
_SHARES = {
    "train_steps_per_epoch": "steps",
    "val_steps_per_epoch": "batches",
    "overfit_batches": "batches",
}


@dataclass(kw_only=True)
class TrainingParameters:
    """Length of a run, accumulation, clipping, validation rhythm.

    A step is always an optimizer step, a batch is always what the loader hands out on one
    rank, and None always means "no such limit" or "off".

    Raises:
        ConfigError: with all problems of the values at once.
    """

    n_epochs: int | None = None
    """Epochs to train. Of the three limits the first reached ends the run."""
    max_steps: int | None = None
    """Optimizer steps to train, over all epochs and restarts."""
    max_time: OptionalDurationField = None  # type: ignore[assignment]
    """Time to train, ``30m`` or seconds, over all restarts (time between runs not counted)."""
    train_steps_per_epoch: int | float | None = None
    """Optimizer steps after which an epoch ends, even if the loader has more batches: 1 is one
    step, 0.25 a quarter of those that the loader gives, 1.0 all of them."""
    overfit_batches: int | float | None = None
    """Train on the first batches of the loader alone, the same ones in the same order in every
    epoch: 1 is one batch on each rank, 0.01 a hundredth of the loader. None is all of it."""
    gradient_accumulation_steps: int = 1
    """Batches per optimizer step. A window never crosses the end of an epoch."""
    global_batch_size: int | None = None
    """Samples per optimizer step over all ranks; derives the accumulation from the loader's
    batch size and the number of data-parallel ranks."""
    gradient_clip_val: float | None = None
    """Largest allowed 2-norm of an optimizer's gradients."""
    track_grad_norm: bool = False
    """Compute the gradient norm also when nothing is clipped."""
    val_every_n_epochs: int | None = 1
    """Validate after every n-th epoch."""
    val_every_n_steps: int | None = None
    """Validate after every n-th optimizer step."""
    val_steps_per_epoch: int | float | None = None
    """Batches of one validation: 1 is one batch, 0.25 a quarter of the loader, 1.0 or None all."""
    num_sanity_val_steps: int = 0
    """Validation batches run before training, to find mistakes early; results are dropped."""
    on_nonfinite: Literal["raise", "skip"] = "raise"
    """What a NaN or infinity in a loss or in gradients does. ``"raise"`` ends the run where a value
    leaves the device anyway, and no step waits for it. ``"skip"`` leaves out the optimizer step on
    all ranks, which costs a norm, a host synchronisation and a small collective in each step."""
    max_skipped_in_a_row: int | None = 10
    """Steps that ``on_nonfinite="skip"`` leaves out one after another; one more ends the run. None
    is no limit."""
    deterministic: bool = False
    """Ask torch for deterministic kernels; ops that have none raise."""
    preemption_signals: list[str] = field(default_factory=lambda: ["SIGTERM", "SIGUSR1"])
    """Signals by which a scheduler ends the run: it saves and exits with status 143."""
    grace_seconds: OptionalDurationField = None  # type: ignore[assignment]
    """Time from such a signal to the end of the process, finished or not, ``90s`` or seconds;
    None is no limit. Set it a little below the time after which the scheduler kills."""
    detect_anomaly: bool = False
    """Name the forward op behind a NaN in backward. Slow."""

    def __post_init__(self) -> None:
        problems = [
            f"{name}={value!r} is not a whole number above 0"
            for name in _COUNTS
            if ((value := getattr(self, name)) is not None or name == "gradient_accumulation_steps")
            and not is_count(value)
        ]
        if self.num_sanity_val_steps != 0 and not is_count(self.num_sanity_val_steps):
            problems.append(
                f"num_sanity_val_steps={self.num_sanity_val_steps!r} is not a whole number from 0"
            )
        for name, unit in _SHARES.items():
            problems += not_a_share(name, getattr(self, name), unit)
        problems += convert_durations(self, "max_time", "grace_seconds", may_be_none=True)
        problems += not_above_zero("gradient_clip_val", self.gradient_clip_val)
        names = self.preemption_signals
        if isinstance(names, str):
            problems.append(f"preemption_signals={names!r} is not a list of names")
            names = []
        problems += [
            f"preemption_signals: {name!r} is no signal that can be caught"
            for name in names
            if name in ("SIGINT", "SIGKILL", "SIGSTOP") or not hasattr(signal.Signals, str(name))
        ]
        if self.on_nonfinite not in ("raise", "skip"):
            problems.append(f"on_nonfinite={self.on_nonfinite!r} is neither 'raise' nor 'skip'")
        if self.global_batch_size is not None and self.gradient_accumulation_steps != 1:
            problems.append(
                f"global_batch_size={self.global_batch_size} derives the accumulation; "
                f"leave out gradient_accumulation_steps={self.gradient_accumulation_steps}"
            )
        if problems:
            raise ConfigError("training_parameters", problems)

    @property
    def is_limited(self) -> bool:
        """Whether anything ends the run."""
        return (self.n_epochs, self.max_steps, self.max_time) != (None, None, None)

    def step_limit(self, num_batches: int | None, batches_per_step: int) -> int | None:
        """Optimizer steps after which an epoch ends; None if only the loader ends it.

        Args:
            num_batches: batches that the train loader has in the epoch; None if it cannot tell.
            batches_per_step: as `accumulation` says.

        Raises:
            ConfigError: a fraction of an epoch whose length is not known.
        """
        steps = None if num_batches is None else math.ceil(num_batches / batches_per_step)
        return self._share("train_steps_per_epoch", steps, "train")

    def val_batch_limit(self, num_batches: int | None) -> int | None:
        """Batches of a validation; None for all of them.

        Args:
            num_batches: batches that the validation loader has; None if it cannot tell.

        Raises:
            ConfigError: a fraction of a validation whose length is not known.
        """
        return self._share("val_steps_per_epoch", num_batches, "validation")

    def overfit_limit(self, num_batches: int | None) -> int | None:
        """Batches that every epoch repeats; None if epochs differ.

        Args:
            num_batches: batches that the train loader has; None if it cannot tell.

        Raises:
            ConfigError: a fraction of an epoch whose length is not known.
        """
        if self.overfit_batches == 1.0 and isinstance(self.overfit_batches, float):
            return num_batches or sys.maxsize  # all of the first epoch, again and again
        return self._share("overfit_batches", num_batches, "train")

    def _share(self, name: str, length: int | None, loader: str) -> int | None:
        try:
            return share_of(getattr(self, name), length)
        except ValueError:
            raise ConfigError(
                "training_parameters",
                [
                    f"{name}={getattr(self, name)!r} is a fraction of an epoch, and the {loader} "
                    "loader cannot tell how long that is"
                ],
                f"Give a whole number of {_SHARES[name]}, or use a map-style data set.",
            ) from None

    def accumulation(self, batch_size: int | None, dp_size: int) -> int:
        """Batches per optimizer step on each rank.

        Args:
            batch_size: samples per batch on one rank; None if the loader cannot tell.
            dp_size: number of data-parallel ranks.

        Raises:
            ConfigError: ``global_batch_size`` is not a multiple of a step over all ranks.
        """
        if self.global_batch_size is None:
            return self.gradient_accumulation_steps
        if batch_size is None:
            raise ConfigError(
                "training_parameters",
                ["global_batch_size needs a train loader that knows its batch size"],
                "Use a DataLoader with batch_size, or set gradient_accumulation_steps.",
            )
        if self.global_batch_size % (batch_size * dp_size):
            raise ConfigError(
                "training_parameters",
                [
                    f"global_batch_size={self.global_batch_size} is not a multiple of "
                    f"{batch_size * dp_size} = batch size {batch_size} x {dp_size} "
                    "data-parallel ranks"
                ],
                "Change the loader's batch size, the number of ranks or global_batch_size.",
            )
        return self.global_batch_size // (batch_size * dp_size)
