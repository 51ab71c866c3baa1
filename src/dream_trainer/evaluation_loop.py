"""EvaluationLoop: a batch's walk through a validation, a test, a prediction."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

import torch

from dream_trainer.data import ResumableLoader
from dream_trainer.errors import ConfigError
from dream_trainer.metrics import LoggedValues, merge_ranks, totals
from dream_trainer.randomness import all_preserved, derive, seed_everything
from dream_trainer.reductions import merged, parts_of

if TYPE_CHECKING:
    from dream_trainer.trainer.base import BaseTrainer

Step = Callable[[Any, int], Any]


class EvaluationLoop:
    """Reads a loader without gradients, and without a trace in the run.

    Args:
        trainer: set up.
        check: called after batches between which a signal may end the run.

    Attributes:
        loader: what is read from; None between evaluations.
        num_batches: that the last evaluation reads on this rank, for a display of progress; None
            if the loader cannot tell.
        may_end: whether a signal may end an evaluation between two batches.
    """

    def __init__(self, trainer: BaseTrainer, check: Callable[[], None]) -> None:
        self._trainer, self._check = trainer, check
        self.loader: ResumableLoader | None = None
        self.num_batches: int | None = None
        self.may_end = True

    def run(
        self, loader: ResumableLoader, step: Step, phase: str, limit: int | None = None
    ) -> dict[str, float]:
        """Means over samples and ranks of what ``step`` returns, and the metrics of a phase.

        Args:
            loader: read from its beginning.
            step: called with each batch and its index.
            phase: ``"val"``, ``"test"`` or ``"sanity"``; prefix of the results' names.
            limit: batches to read at most.
        """
        trainer = self._trainer
        loader.rewind()
        trainer.place.enter("validation")
        pre_step, post_step = self._step_hooks(phase)
        may_end = self._may_end_between_batches(phase)
        with self.surrounding(phase, loader, limit), closing(iter(loader)) as batches:
            values = trainer.logged
            for batch_idx, batch in enumerate(itertools.islice(batches, limit)):
                batch = trainer.batch_to_device(batch)
                # What a filler measures and logs would count a sample twice.
                is_filler = loader.num_samples == 0
                trainer.metrics.enter("filler" if is_filler else phase)
                trainer.logged = LoggedValues() if is_filler else values
                pre_step(trainer, batch, batch_idx)
                result = step(batch, batch_idx)
                post_step(trainer, result, batch, batch_idx)
                values.add_result(result, loader.num_samples, f"{phase}/")
                values.resolve()
                if may_end:
                    self._check()
            own = totals([values.take()])[0], parts_of([values.take_reduced()])[0]
            parts = trainer.world.gather_data_parallel(own)
            means, reduced = merge_ranks(p for p, _ in parts), merged(p for _, p in parts)
            metrics = trainer.metrics.compute(phase)
            if both := (means.keys() & (metrics.keys() | reduced)) | (reduced.keys() & metrics):
                raise ConfigError(
                    phase,
                    [f"{name} comes from two places, or is reduced in two ways" for name in both],
                    "A metric, a value that a step returns and one that is logged have names of "
                    "their own.",
                )
            return means | reduced | metrics

    def test(self, loader: ResumableLoader) -> dict[str, float]:
        """Run ``test_step`` over a loader; the results are the same on every rank."""
        trainer = self._trainer
        trainer.callbacks.pre_test_epoch(trainer)
        results = self.run(loader, trainer.test_step, "test")
        trainer.callbacks.post_test_epoch(trainer, results)
        return results

    def predict(self, loader: ResumableLoader, *, keep: bool = True) -> list[Any]:
        """What ``predict_step`` returns for each batch of this rank, in order.

        Args:
            loader: read from its beginning.
            keep: False keeps nothing of it.

        Raises:
            Interrupted: after a batch, if Ctrl-C asked for it.
            Preempted: after a batch, if a scheduler's signal asked for it.
        """
        trainer, results = self._trainer, list[Any]()
        callbacks, may_end = trainer.callbacks, self._may_end_between_batches("predict")
        loader.rewind()
        callbacks.pre_predict_epoch(trainer)
        with self.surrounding("predict", loader), closing(iter(loader)) as batches:
            for batch_idx, batch in enumerate(batches):
                batch = trainer.batch_to_device(batch)
                callbacks.pre_predict_step(trainer, batch, batch_idx)
                result = trainer.predict_step(batch, batch_idx)
                if loader.num_samples != 0:
                    callbacks.post_predict_step(trainer, result, batch, batch_idx)
                    if keep:
                        results.append(result)
                result = None  # two batches of results would be in memory
                if may_end:
                    self._check()
            trainer.metrics.end("predict")
        callbacks.post_predict_epoch(trainer, results)
        return results

    def _step_hooks(self, phase: str) -> tuple[Callable[..., None], Callable[..., None]]:
        callbacks = self._trainer.callbacks
        if phase == "val":
            return callbacks.pre_validation_step, callbacks.post_validation_step
        if phase == "test":
            return callbacks.pre_test_step, callbacks.post_test_step
        return _no_hook, _no_hook

    def _may_end_between_batches(self, phase: str) -> bool:
        return (
            self.may_end
            and phase != "sanity"
            and (phase != "val" or not self._validation_has_hooks)
        )

    @property
    def _validation_has_hooks(self) -> bool:
        """Whether it may have changed what `on_interrupt` would save."""
        return self._trainer.is_fitting and self._trainer.has_validation_hooks

    @contextmanager
    def surrounding(
        self, phase: str, loader: ResumableLoader, limit: int | None = None
    ) -> Iterator[None]:
        """Without gradients, in eval mode, and without a trace in the run's random streams.

        Args:
            phase: whose metrics begin anew; it also names the streams.
            loader: that is read, from where it stands.
            limit: batches to read at most.
        """
        trainer = self._trainer
        modules = [part for module in trainer.sync_modules for part in module.modules()]
        modes = [part.training for part in modules]
        for module in trainer.sync_modules:
            module.eval()
        # Left among the step's, they would be written with the next one, and lost by a restart.
        logged, trainer.logged = trainer.logged, LoggedValues()
        self.loader = loader
        known = [number for number in (loader.num_batches, limit) if number is not None]
        self.num_batches = min(known, default=None)
        try:
            with (
                all_preserved(),
                torch.no_grad(),
                trainer.callbacks.evaluation(trainer, phase),
            ):
                seed_everything(derive(trainer.seed, phase, trainer.world.dp_rank))
                trainer.metrics.reset(phase)
                yield
        finally:
            self.loader = None
            trainer.logged = logged
            for part, mode in zip(modules, modes, strict=True):
                part.training = mode
            trainer.metrics.enter("train")


def _no_hook(*_: Any) -> None:
    pass
