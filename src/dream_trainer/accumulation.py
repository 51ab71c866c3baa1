"""One accumulation window: which batches share a step, and with what weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

Weight = Tensor | float | int


class SampleCounts(Protocol):
    """What a window asks of the loader."""

    num_samples: int | None
    num_samples_all_ranks: int | None
    is_last: bool | None

    def num_samples_ahead(self, num_batches: int) -> list[int] | None:
        """Samples over all ranks in each of the next batches."""


class AccumulationWindow:
    """Scales losses so that a step's gradient is a mean over its whole window.

    Every sample of the window counts the same, over all batches and ranks; where the loader
    cannot count samples, every batch does. With weights of the user's own, the gradient is the
    weighted mean, normalised at the step, when the sum of weights is known.

    Args:
        size: batches per window.
        dp_size: data-parallel ranks; gradients are averaged over them by the strategy.
        sum_over_ranks: all-reduce of a tensor; called once per weighted step.
    """

    def __init__(self, size: int, dp_size: int, sum_over_ranks: Callable[[Tensor], Tensor]) -> None:
        self.size = size
        self._dp_size, self._sum_over_ranks = dp_size, sum_over_ranks
        self._planned = size
        self._num_batches = 0
        self._num_samples: int | None = None
        self._num_samples_used = 0
        self._scale = 1.0
        self._is_filler = False
        self.is_accumulating = self.is_in_batch = False
        self._weights: list[Weight] = []
        self._stepping: list[Weight] = []
        self._num_backwards = self._num_backwards_stepped = 0
        self._is_weighted: bool | None = None
        self._steps: dict[str, int] = {}

    def start_batch(self, loader: SampleCounts) -> None:
        """A batch was handed out; ``training_step`` comes next."""
        num_samples, all_samples = loader.num_samples, loader.num_samples_all_ranks
        if self._num_batches == 0:
            self._planned, self._num_samples = self.size, all_samples
            if self.size > 1 and all_samples is not None:
                self._plan_ahead(loader, all_samples)
        self._num_batches += 1
        self._num_samples_used += all_samples or 0
        self.is_in_batch = True
        self._num_backwards = self._num_backwards_stepped = 0
        self._stepping = self._weights
        self._steps.clear()
        self._is_filler = num_samples == 0
        if self._num_samples is None or num_samples is None:
            self._scale = 1.0 / self._planned
        else:
            self._scale = num_samples * self._dp_size / self._num_samples
        self.is_accumulating = self._num_batches < self._planned and not loader.is_last

    def finish_batch(self) -> bool:
        """``training_step`` is over.

        Returns:
            Whether this batch ended its window.
        """
        self.is_in_batch = False
        if self.is_accumulating:
            return False
        self._num_batches = self._num_samples_used = 0
        if self._weights:
            self._weights.clear()
        self._is_weighted = None
        return True

    def weighted(self, loss: Tensor, weight: Weight | None) -> tuple[Tensor, float]:
        """The loss to call backward on, and what its gradient is to be multiplied by.

        Raises:
            ValueError: weights are given for some losses of the window and not for others.
        """
        if self._is_weighted is None:
            self._is_weighted = weight is not None
        elif self._is_weighted != (weight is not None):
            raise ValueError(
                "backward() got a weight for some losses of an accumulation window only. "
                "Pass a weight every time, or never."
            )
        if weight is None:
            return loss, self._scale
        if self._is_filler:
            weight = weight * 0
        if self._num_backwards == len(self._weights):
            self._weights.append(weight)
        else:
            # Not in place: the first summand is the user's own tensor.
            self._weights[self._num_backwards] = self._weights[self._num_backwards] + weight
        self._num_backwards += 1
        return loss * weight, 1.0

    @property
    def weight(self) -> Weight | None:
        """Sum over the window's batches of the weights given to their first backward."""
        return self._weights[0] if self._weights else None

    def gradient_factor(self, device: torch.device) -> Tensor | float | None:
        """What a step multiplies its gradients by; None where they are right already.

        The backward calls since the previous step of this batch belong to this step; if there
        are none, those of the previous one do, as when optimizers step after a joint loss.
        """
        if not self._is_weighted:
            # Planned longer than the data went on: the loader could not tell its length.
            is_short = self._num_samples is None and 0 < self._num_batches < self._planned
            return self._planned / self._num_batches if is_short else None
        since = self._weights[self._num_backwards_stepped : self._num_backwards]
        self._num_backwards_stepped = self._num_backwards
        self._stepping = mine = since or self._stepping
        # Counts of tokens soon need more digits than float32 has. MPS has no float64.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        total = torch.stack([torch.as_tensor(w, device=device).to(dtype) for w in mine]).mean()
        total = self._sum_over_ranks(total.detach())
        # Nothing counted: the gradients are zero, and 0 / 0 would make them NaN.
        return torch.where(total == 0, total, self._dp_size / total)

    def state_dict(self) -> dict[str, Any]:
        """What the rest of the window depends on; nothing between windows. Differs by rank."""
        if not self._num_batches:
            return {}
        return {
            "planned": self._planned,
            "num_batches": self._num_batches,
            "num_samples": self._num_samples,
            "num_samples_used": self._num_samples_used,
            "is_weighted": self._is_weighted,
            "weights": list(self._weights),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on inside a window, or between windows with an empty state."""
        self._num_batches = state_dict.get("num_batches", 0)
        self.is_accumulating = self._num_batches > 0
        self._planned = state_dict.get("planned", self.size)
        self._num_samples = state_dict.get("num_samples")
        self._num_samples_used = state_dict.get("num_samples_used", 0)
        self._is_weighted = state_dict.get("is_weighted")
        self._weights = list(state_dict.get("weights", ()))

    def count_step(self, optimizer: str) -> bool:
        """An optimizer stepped.

        Returns:
            Whether this is a new step of the run: optimizers that step side by side count once.
        """
        steps = self._steps
        if not steps:
            steps[optimizer] = 1
            return True
        before = max(steps.values())
        steps[optimizer] = steps.get(optimizer, 0) + 1
        return steps[optimizer] > before

    def _plan_ahead(self, loader: SampleCounts, num_samples: int) -> None:
        ahead: Sequence[int] = loader.num_samples_ahead(self.size - 1) or ()
        self._planned = 1 + len(ahead)
        self._num_samples = num_samples + sum(ahead)


def no_loss(found: object) -> TypeError:
    """The error of something that a backward pass cannot begin with."""
    what = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
    return TypeError(f"the loss is a tensor with one element, got {what}; call .mean()")
