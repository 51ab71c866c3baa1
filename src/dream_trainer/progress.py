"""Every counter of a run, in one place."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

#: Counters of this process, not of the run: a restart begins them anew.
_LOCAL = ("local_batches",)


@dataclass
class Progress:
    """Where a run is.

    A *step* is an optimizer step: the smallest number of times that any optimizer can have
    stepped, so optimizers that step side by side on a batch count once. A *batch* is what the
    loader hands out on one rank. A *window* is the batches that share one step.
    """

    num_steps: int = 0
    """Optimizer steps taken, over all epochs and restarts."""
    epoch: int = 0
    """Epochs completed; also the index, from 0, of the epoch under way."""
    num_batches: int = 0
    """Batches finished on each rank, over all epochs and restarts."""
    num_batches_in_epoch: int = 0
    """Batches finished on each rank in the epoch under way; the next ``batch_idx``."""
    num_steps_in_epoch: int = 0
    """Optimizer steps taken in the epoch under way."""
    num_batches_in_window: int = 0
    """Batches finished of the accumulation window under way."""
    local_batches: int = 0
    """Batches finished since this process started."""
    seconds: float = 0.0
    """Training time over all restarts, in seconds, by rank 0's clock."""
    in_epoch: bool = False
    """Whether ``pre_epoch`` of the epoch under way was called."""
    is_step_open: bool = False
    """Whether the validation and ``on_boundary`` of the last step are still to come."""
    last_batch_finished: bool = False
    """Whether the last batch of the epoch under way is finished, as far as is known."""
    train_epoch_finished: bool = False
    """Whether ``post_train_epoch`` of the epoch under way was called."""
    is_epoch_closing: bool = False
    """Whether ``post_epoch`` of the epoch under way was called."""
    num_skipped_steps: int = 0
    """Steps of optimizers that were counted and not taken, as ``on_nonfinite="skip"`` says."""
    num_skipped_in_a_row: dict[str, int] = field(default_factory=dict)
    """The same by optimizer, since the last step that it took."""
    last_validation_step: int = -1
    """Value of ``num_steps`` at the last finished validation."""

    def start_epoch(self) -> None:
        """An epoch begins."""
        self.in_epoch = True

    def finish_batch(self, is_window_end: bool, is_last: bool = False) -> None:
        """A batch went through ``training_step``."""
        self.is_step_open, self.last_batch_finished = is_window_end, is_last
        self.num_batches += 1
        self.num_batches_in_epoch += 1
        self.local_batches += 1
        self.num_batches_in_window = 0 if is_window_end else self.num_batches_in_window + 1

    def finish_step(self) -> None:
        """An optimizer stepped."""
        self.num_steps += 1
        self.num_steps_in_epoch += 1

    def close_step(self) -> None:
        """Only ``on_boundary`` of the step is still to be called."""
        self.is_step_open = False

    def take_back(self, num_batches: int) -> None:
        """Finished batches are to be done again."""
        self.num_batches -= num_batches
        self.num_batches_in_epoch -= num_batches
        self.num_batches_in_window = 0

    def finish_train_epoch(self) -> None:
        """The epoch's training batches are used up."""
        self.train_epoch_finished = True

    def finish_validation(self) -> None:
        """A validation ran to its end."""
        self.last_validation_step = self.num_steps

    def close_epoch(self) -> None:
        """Training and validation of an epoch are over; ``post_epoch`` is called."""
        self.is_epoch_closing = True

    def finish_epoch(self) -> None:
        """The next epoch comes."""
        self.epoch += 1
        self.num_batches_in_epoch = self.num_steps_in_epoch = 0
        self.in_epoch = self.train_epoch_finished = False
        self.last_batch_finished = self.is_epoch_closing = False

    @property
    def place(self) -> str:
        """Where the run is, for people; see `place_in_words`."""
        return place_in_words(self.num_steps, self.epoch, self.in_epoch)

    def state_dict(self) -> dict[str, Any]:
        """The counters as plain data, without those of this process alone."""
        return {name: value for name, value in asdict(self).items() if name not in _LOCAL}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over counters; those missing keep their value."""
        known = {one.name for one in fields(self)} - set(_LOCAL)
        for name in known & state_dict.keys():
            # A copy: what is given stays as it is.
            setattr(self, name, copy.copy(state_dict[name]))


def place_in_words(num_steps: int, num_epochs: int, in_epoch: bool) -> str:
    """``"step 46, after 2 epochs"`` between two epochs, ``"step 50, in epoch 3"`` inside one.

    So a number of epochs is one of completed ones, and an epoch's own number counts from 1.

    Args:
        num_steps: optimizer steps taken.
        num_epochs: epochs completed.
        in_epoch: whether the next one has begun.
    """
    if in_epoch:
        return f"step {num_steps}, in epoch {num_epochs + 1}"
    return f"step {num_steps}, after {num_epochs} epoch{'s' * (num_epochs != 1)}"


def reaches_multiple(step: int, every: int, *, after: int) -> bool:
    """Whether a step is a multiple, or the first that was looked at since one.

    A batch that takes several optimizer steps may pass over the multiple itself.

    Args:
        step: optimizer steps taken.
        every: the number.
        after: ``step`` of the last look.
    """
    return step % every == 0 or step // every > after // every
