"""Callback: every hook, in the order of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

if TYPE_CHECKING:
    from dream_trainer.trainer.base import BaseTrainer


class Callback:
    """Base class of callbacks. Override the hooks you want; the others cost nothing.

    Hooks run on every rank. A callback whose behaviour depends on what it has seen should have
    ``state_dict() -> dict`` and ``load_state_dict(state)``, so that it resumes exactly; the state
    is plain data and tensors, the same on every rank.

    The methods below stand in the order in which a run calls them.

    Attributes:
        holds_weights: whether its state holds weights that evaluations use in place of the
            models', an average for example. ``test(checkpoint=...)`` gives it the checkpoint's
            for the time of the test, or an empty state if there is none.
    """

    holds_weights = False

    def pre_launch(self, trainer: BaseTrainer) -> None:
        """Before the processes of the run exist; rank and size are not known yet."""

    def pre_configure(self, trainer: BaseTrainer) -> None:
        """After launch and seeding, before models are made."""

    def post_configure(self, trainer: BaseTrainer) -> None:
        """Models exist, on no device yet."""

    def pre_setup(self, trainer: BaseTrainer) -> None:
        """Before models are placed and wrapped."""

    def post_setup(self, trainer: BaseTrainer) -> None:
        """Models, optimizers, schedulers and loaders are ready; nothing is restored yet."""

    def pre_fit(self, trainer: BaseTrainer) -> None:
        """The state is restored; the first batch comes next."""

    def pre_epoch(self, trainer: BaseTrainer) -> None:
        """An epoch begins. Not called again when a run resumes inside it."""

    def pre_train_epoch(self, trainer: BaseTrainer) -> None:
        """The training part of an epoch begins."""

    def pre_train_step(self, trainer: BaseTrainer, batch: Any, batch_idx: int) -> None:
        """Before ``training_step``, for every batch."""

    def pre_optimizer_step(self, trainer: BaseTrainer, optimizer: Optimizer) -> None:
        """Gradients are complete, not clipped yet."""

    def post_optimizer_step(self, trainer: BaseTrainer, optimizer: Optimizer) -> None:
        """The optimizer and its scheduler have stepped."""

    def post_train_step(
        self, trainer: BaseTrainer, result: Any, batch: Any, batch_idx: int
    ) -> None:
        """After ``training_step``; ``result`` is what it returned."""

    def post_train_epoch(self, trainer: BaseTrainer) -> None:
        """The training part of an epoch is over."""

    def pre_validation_epoch(self, trainer: BaseTrainer) -> None:
        """A validation begins."""

    def pre_validation_step(self, trainer: BaseTrainer, batch: Any, batch_idx: int) -> None:
        """Before ``validation_step``."""

    def post_validation_step(
        self, trainer: BaseTrainer, result: Any, batch: Any, batch_idx: int
    ) -> None:
        """After ``validation_step``."""

    def post_validation_epoch(self, trainer: BaseTrainer, results: Mapping[str, float]) -> None:
        """A validation is over; ``results`` are the same on every rank."""

    def post_epoch(self, trainer: BaseTrainer) -> None:
        """Training and validation of an epoch are over."""

    def on_boundary(self, trainer: BaseTrainer) -> None:
        """All that belongs to a step, or to an epoch, is over: the moment to save."""

    def post_fit(self, trainer: BaseTrainer) -> None:
        """The run has reached its end."""

    def pre_test_epoch(self, trainer: BaseTrainer) -> None:
        """``test`` begins."""

    def pre_test_step(self, trainer: BaseTrainer, batch: Any, batch_idx: int) -> None:
        """Before ``test_step``."""

    def post_test_step(self, trainer: BaseTrainer, result: Any, batch: Any, batch_idx: int) -> None:
        """After ``test_step``."""

    def post_test_epoch(self, trainer: BaseTrainer, results: Mapping[str, float]) -> None:
        """``test`` is over; ``results`` are the same on every rank."""

    def pre_predict_epoch(self, trainer: BaseTrainer) -> None:
        """``predict`` begins."""

    def pre_predict_step(self, trainer: BaseTrainer, batch: Any, batch_idx: int) -> None:
        """Before ``predict_step``."""

    def post_predict_step(
        self, trainer: BaseTrainer, result: Any, batch: Any, batch_idx: int
    ) -> None:
        """After ``predict_step``; not for a batch that only fills up, see `ResumableLoader`."""

    def post_predict_epoch(self, trainer: BaseTrainer, results: Sequence[Any]) -> None:
        """``predict`` is over; ``results`` are those of this rank, in order."""

    def on_interrupt(self, trainer: BaseTrainer) -> None:
        """Ctrl-C or a scheduler's signal ended the run, if at all possible between two batches."""

    def on_exception(self, trainer: BaseTrainer, exception: BaseException) -> None:
        """An exception ended the run; it is raised again afterwards."""

    def close(self, trainer: BaseTrainer) -> None:
        """Release what was opened. Called however the run ended."""


#: Names of all hooks, in the order of a run.
HOOKS = tuple(
    name for name, member in vars(Callback).items() if callable(member) and name[0] != "_"
)
