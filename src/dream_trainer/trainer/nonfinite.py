"""What ``on_nonfinite="skip"`` does: a step with NaN or infinity in it leaves no trace."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from dream_trainer.errors import NonFiniteError
from dream_trainer.trainer.finiteness import first_nonfinite_gradient

if TYPE_CHECKING:
    from dream_trainer.trainer.base import BaseTrainer

#: Skipped steps that are told of one by one; later ones are counted.
_MOST_TOLD = 10


class StepGuard:
    """Decides, on all ranks together, whether an optimizer may step.

    It may not if a loss of the window, or the norm of the optimizer's gradients, is NaN or
    infinite on any rank. The decision costs a norm, a host synchronisation and one small
    collective per step. What the forward did to running statistics of normalisation layers is
    taken back with a step that is skipped.

    This is the one place where a policy is decided and carried out.

    Args:
        trainer: set up.
    """

    def __init__(self, trainer: BaseTrainer) -> None:
        self._trainer = trainer
        self._losses: list[Tensor] = []
        self._has_bad_loss = False
        modules = [m for model in trainer.components.models.values() for m in model.modules()]
        self._statistics = [
            tensor
            for module in modules
            if isinstance(module, _NormBase)
            for tensor in module.buffers(recurse=False)
        ]
        self._remembered = [tensor.clone() for tensor in self._statistics]

    def start_window(self) -> None:
        """What was before is no part of the next steps, stepped on or not."""
        self._remember_statistics()
        self._losses.clear()
        self._has_bad_loss = False

    def note_loss(self, loss: Tensor) -> None:
        """Remember whether a loss of the window is finite; nothing waits for it yet."""
        self._losses.append(loss.detach().isfinite().all())

    def allows(self, name: str, optimizer: Optimizer, norm: Tensor) -> bool:
        """Whether an optimizer may step; the same on every rank.

        Args:
            name: of the optimizer.
            optimizer: the user's own.
            norm: of its gradients, over all ranks.

        Raises:
            NonFiniteError: on every rank, for one step too many in a row.
        """
        trainer = self._trainer
        if trainer.world.scales_loss:
            # Infinite gradients are how a loss scale finds its size; the scaler leaves them out.
            return True
        self._look_at_losses()
        if not trainer.world.any(self._has_bad_loss or not bool(norm.isfinite())):
            return True
        self._take_back_statistics()
        self._count(name, optimizer)
        return False

    def finish_step(self, name: str, is_taken: bool) -> None:
        """An optimizer has stepped, or not; the next one has losses of its own."""
        if is_taken:
            self._trainer.progress.num_skipped_in_a_row.pop(name, None)
        self.start_window()

    def state_dict(self) -> dict[str, Any]:
        """What the rest of a window depends on. Differs by rank."""
        self._look_at_losses()
        return {
            "has_bad_loss": self._has_bad_loss,
            "statistics": [tensor.clone() for tensor in self._remembered],
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on inside a window, or between windows with an empty state."""
        self._losses.clear()
        self._has_bad_loss = state_dict.get("has_bad_loss", False)
        self._remember_statistics()
        for mine, saved in zip(self._remembered, state_dict.get("statistics", ()), strict=False):
            mine.copy_(saved)

    def _look_at_losses(self) -> None:
        if self._losses:
            self._has_bad_loss |= not bool(torch.stack(self._losses).all())
            self._losses.clear()

    @torch.no_grad()
    def _remember_statistics(self) -> None:
        if self._statistics:
            torch._foreach_copy_(self._remembered, self._statistics)

    @torch.no_grad()
    def _take_back_statistics(self) -> None:
        if self._statistics:
            torch._foreach_copy_(self._statistics, self._remembered)

    def _count(self, name: str, optimizer: Optimizer) -> None:
        trainer, progress = self._trainer, self._trainer.progress
        progress.num_skipped_steps += 1
        in_a_row = progress.num_skipped_in_a_row.get(name, 0) + 1
        progress.num_skipped_in_a_row[name] = in_a_row
        trainer.logged.add_number("train/skipped_steps", progress.num_skipped_steps)
        in_all = progress.num_skipped_steps
        limit = trainer.training_parameters.max_skipped_in_a_row
        is_too_many = limit is not None and in_a_row > limit
        if not is_too_many and in_all > _MOST_TOLD and in_all % 100:
            return
        bad = first_nonfinite_gradient(trainer.components, optimizer)
        mine = "the loss" if self._has_bad_loss else bad and f"the gradient of {bad}"
        found = [one for one in trainer.world.all_gather_object(mine) if one]
        what = found[0] if found else "the norm of the gradients"
        where = (
            f"step {progress.num_steps + 1} (epoch {progress.epoch}, batch "
            f"{progress.num_batches_in_epoch}) of optimizer {name}: {what} is not finite"
        )
        if is_too_many:
            raise NonFiniteError(
                f"{where}, after {limit} skipped in a row. Lower the learning rate, set "
                "gradient_clip_val, look at the data of that batch, or raise "
                "training_parameters.max_skipped_in_a_row."
            )
        trainer.world.print(f"skipped {where}; {in_all} skipped so far")
