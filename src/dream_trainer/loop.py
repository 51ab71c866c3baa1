"""FitLoop: a batch's walk, top to bottom.

Each level of the drawing is a method:

    run             while the run is not done
      train_epoch     for batch in train loader
        train_step      callbacks.pre_train_step
                        training_step (the user's)   > backward > step
                        callbacks.post_train_step
      validate        for batch in val loader: validation_step (the user's)
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable
from contextlib import closing
from typing import TYPE_CHECKING, Any

from dream_trainer.accumulation import AccumulationWindow
from dream_trainer.data import ResumableLoader
from dream_trainer.evaluation_loop import EvaluationLoop
from dream_trainer.metrics import LoggedValues
from dream_trainer.progress import reaches_multiple

if TYPE_CHECKING:
    from dream_trainer.trainer.base import BaseTrainer


class FitLoop:
    """Calls the user's steps in the right order; what users call themselves is the trainer's.

    Args:
        trainer: set up and restored.
        window: the accumulation window that the trainer's ``backward`` and ``step`` use.
        clock: seconds from any start.

    Attributes:
        evaluations: the loop of validations, tests and predictions.
    """

    def __init__(
        self,
        trainer: BaseTrainer,
        train_loader: ResumableLoader,
        val_loader: ResumableLoader | None,
        window: AccumulationWindow,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.trainer = trainer
        self.train_loader = train_loader
        self.val_loader = val_loader
        self.window = window
        self._clock = clock
        self._last_time = 0.0
        self._step_limit = self._steps_of_epoch()
        # What every batch needs, looked up once.
        self._place, self._interruption = trainer.place, trainer.interruption
        self._moves_batches = trainer.moves_batches
        self._is_parallel = trainer.world.is_parallel
        if val_loader is not None:  # a fraction of an unknown length is known now, not in an hour
            trainer.training_parameters.val_batch_limit(val_loader.num_batches)
        self._is_watching = False
        self.evaluations = EvaluationLoop(trainer, self.check)

    def run(self) -> None:
        """Train until a limit is reached or `stop` was called.

        Raises:
            Interrupted: after a batch, if Ctrl-C asked for it.
            Preempted: after a batch, if a scheduler's signal asked for it.
        """
        self._last_time = self._clock()
        self._step_limit = self._steps_of_epoch()
        self._is_watching = self.trainer.monitored.is_watching
        self.check()
        if self.trainer.progress.is_step_open:
            self.finish_step()  # the checkpoint lies between a step and its validation
        while not self.is_done or self._has_epoch_to_finish:
            self.train_epoch()
            if not self.trainer.progress.train_epoch_finished:
                return  # stopped inside the epoch; a later run goes on from there
            self.finish_epoch()
            self.check()

    @property
    def is_evaluating(self) -> bool:
        """Whether a validation, test or prediction is under way."""
        return self.evaluations.loader is not None

    def check(self) -> None:
        """A place where the run may end; every rank comes through the same ones.

        Raises:
            Interrupted: Ctrl-C asked for it.
            Preempted: a scheduler's signal asked for it.
        """
        self._interruption.check()
        if self._interruption.stop_reason is not None:
            self._take_stop()

    def _settle(self) -> None:
        """A place where `stop` takes effect, and no signal does."""
        self.trainer.interruption.settle()
        self._take_stop()

    def _take_stop(self) -> None:
        if (reason := self.trainer.interruption.stop_reason) is not None:
            self.trainer.stop_reason = reason

    @property
    def is_done(self) -> bool:
        """Whether the run ends here. The same on every rank."""
        trainer, progress = self.trainer, self.trainer.progress
        limits = trainer.config.training_parameters
        done = (
            trainer.stop_reason is not None
            or (limits.n_epochs is not None and progress.epoch >= limits.n_epochs)
            or (limits.max_steps is not None and progress.num_steps >= limits.max_steps)
        )
        if limits.max_time is not None:
            # Ranks' clocks differ. Costs a broadcast per step, with this limit only.
            done |= trainer.world.broadcast(progress.seconds >= limits.max_time)
        return done

    def train_epoch(self) -> None:
        """Train to the end of the epoch, or until the run is done."""
        trainer, progress, callbacks = self.trainer, self.trainer.progress, self.trainer.callbacks
        if not progress.in_epoch:
            callbacks.pre_epoch(trainer)
            trainer.metrics.reset("train")
            trainer.monitored.start_epoch()
            callbacks.pre_train_epoch(trainer)
            progress.start_epoch()
        trainer.metrics.enter("train")
        if progress.train_epoch_finished:
            return
        self.train_loader.set_epoch(progress.epoch)
        self._step_limit = self._steps_of_epoch()
        # Done by a limit, with batches left over: the epoch stays open for a later run.
        if not self._epoch_has_steps_left or self._train_batches():
            self._require_steps()
            progress.finish_train_epoch()
            # Also where a limit ended the epoch: a resumed run finds its end by reading on.
            self.train_loader.set_epoch(progress.epoch + 1)
            if self._is_watching:
                trainer.monitored.finish_epoch()
            callbacks.post_train_epoch(trainer)

    def _train_batches(self) -> bool:
        """Train on the epoch's batches until they end, or a limit is reached.

        Returns:
            Whether the epoch is over.
        """
        # Closed here, or an error's traceback would keep the loader's workers alive.
        with closing(iter(self.train_loader)) as batches:
            self._place.enter("loader")
            for batch in batches:
                if self._moves_batches:
                    batch = self.trainer.batch_to_device(batch)
                is_window_end = self.train_step(batch)
                if is_window_end:
                    self.finish_step()
                self.check()
                if is_window_end:
                    if not self._epoch_has_steps_left:
                        return True
                    if self.is_done:
                        return self.trainer.progress.last_batch_finished
                self._place.enter("loader")
        if not self.trainer.progress.num_batches_in_epoch:
            # Epochs without batches would follow each other for ever.
            raise RuntimeError(
                f"the train loader gave no batch in epoch {self.trainer.current_epoch}. A "
                "generator can be used once only: pass an object whose __iter__ starts anew."
            )
        return True

    def _require_steps(self) -> None:
        progress, trainer = self.trainer.progress, self.trainer
        if progress.num_batches and not progress.num_steps and trainer.named_optimizers():
            raise RuntimeError(
                f"{type(trainer).__name__}.training_step took no optimizer step in a whole epoch. "
                "Call self.backward(loss) and self.step() in it; a loss that it returns is only "
                "logged."
            )

    def train_step(self, batch: Any) -> bool:
        """Take one batch through ``training_step``.

        Returns:
            Whether it ended its accumulation window.
        """
        trainer, progress, loader = self.trainer, self.trainer.progress, self.train_loader
        batch_idx = progress.num_batches_in_epoch
        self._place.enter_step(progress.num_steps, progress.epoch, batch_idx)
        if trainer.guard is not None and not progress.num_batches_in_window:
            trainer.guard.start_window()
        self.window.start_batch(loader)
        trainer.callbacks.pre_train_step(trainer, batch, batch_idx)
        if loader.num_samples == 0:
            result = self._step_on_filler(batch, batch_idx)
        elif self._is_parallel:
            result = self._step_on_ranks(batch, batch_idx)
        else:
            result = trainer.training_step(batch, batch_idx)
        trainer.logged.add_result(result, loader.num_samples, "train/")
        is_window_end = self.window.finish_batch()
        progress.finish_batch(is_window_end, loader.is_last is True)
        if self._is_watching and is_window_end:
            trainer.monitored.take_step()
        trainer.callbacks.post_train_step(trainer, result, batch, batch_idx)
        if not is_window_end:
            trainer.logged.resolve()
        return is_window_end

    def _step_on_ranks(self, batch: Any, batch_idx: int) -> Any:
        trainer = self.trainer
        if not self.window.is_accumulating:
            return trainer.training_step(batch, batch_idx)
        with trainer.world.accumulate(trainer.sync_modules, enabled=True):
            return trainer.training_step(batch, batch_idx)

    def _step_on_filler(self, batch: Any, batch_idx: int) -> Any:
        """What it measures and logs would count a sample twice."""
        trainer, logged = self.trainer, self.trainer.logged
        trainer.metrics.enter("filler")
        trainer.logged = LoggedValues()
        result = self._step_on_ranks(batch, batch_idx)
        trainer.metrics.enter("train")
        trainer.logged = logged
        return result

    def finish_step(self) -> None:
        """After a window: validation if due, then the moment to save."""
        trainer = self.trainer
        self._count_seconds()
        if trainer.config.training_parameters.val_every_n_steps is not None:
            self.validate_if_due()
        trainer.progress.close_step()
        self._place.enter("save")
        trainer.callbacks.on_boundary(trainer)
        trainer.logged.drop()  # if nobody took it

    def finish_epoch(self) -> None:
        """After the last batch: validation if due, the epoch's end, the moment to save."""
        trainer, progress = self.trainer, self.trainer.progress
        every = trainer.training_parameters.val_every_n_epochs
        is_due = every is not None and (progress.epoch + 1) % every == 0
        if is_due and progress.last_validation_step != progress.num_steps:
            self.validate()
            self.check()
        if not progress.is_epoch_closing:
            progress.close_epoch()
            trainer.scheduler_steps.after("epoch")
            trainer.callbacks.post_epoch(trainer)
        self._settle()
        progress.finish_epoch()
        self._count_seconds()
        trainer.place.enter("save")
        trainer.callbacks.on_boundary(trainer)

    def validate_if_due(self) -> None:
        """Validate if the step under way asks for it and has not been validated."""
        progress, every = self.trainer.progress, self.trainer.training_parameters.val_every_n_steps
        last = max(progress.last_validation_step, 0)
        if every is None or progress.num_steps == last:
            return
        if reaches_multiple(progress.num_steps, every, after=last):
            self.check()  # validation can take long
            self.validate()
            self.check()

    def validate(self) -> dict[str, float]:
        """Run the validation loader once; the results are the same on every rank."""
        trainer = self.trainer
        if self.val_loader is None:
            return {}
        trainer.callbacks.pre_validation_epoch(trainer)
        self.val_loader.rewind()  # a run that was continued must not count another epoch's batches
        limit = trainer.training_parameters.val_batch_limit(self.val_loader.num_batches)
        results = self.evaluations.run(self.val_loader, trainer.validation_step, "val", limit)
        if trainer.is_fitting:
            trainer.validation_results = results
            trainer.progress.finish_validation()
            trainer.scheduler_steps.after("validation")
        trainer.callbacks.post_validation_epoch(trainer, results)
        return results

    def sanity_check(self) -> None:
        """Run a few validation batches and forget them."""
        limit = self.trainer.training_parameters.num_sanity_val_steps
        if limit and self.val_loader is not None:
            self.evaluations.run(self.val_loader, self.trainer.validation_step, "sanity", limit)

    def read_training_data(self, step: Callable[..., None]) -> None:
        """Take one epoch of the training data through a step, without a trace in the run.

        As many batches as an epoch of the run has: data need not end by themselves.

        Args:
            step: called with each batch, its index, and ``is_filler``. What it logs and measures
                is forgotten.

        Raises:
            Interrupted: after a batch, if Ctrl-C asked for it.
            Preempted: after a batch, if a scheduler's signal asked for it.
        """
        trainer, loader = self.trainer, self.train_loader
        position = copy.deepcopy(loader.state_dict())
        loader.set_epoch(loader.epoch + 1)
        num_steps = self._steps_of_epoch()
        limit = None if num_steps is None else num_steps * self.window.size
        try:
            with self.evaluations.surrounding("filler", loader), closing(iter(loader)) as batches:
                trainer.metrics.enter("filler")
                for batch_idx, batch in enumerate(itertools.islice(batches, limit)):
                    batch = trainer.batch_to_device(batch)
                    step(batch, batch_idx, is_filler=loader.num_samples == 0)
                    trainer.logged.drop()
                    self.check()
        finally:
            loader.load_state_dict(position)

    def close(self) -> None:
        """End worker processes that live across epochs."""
        for loader in (self.train_loader, self.val_loader):
            if loader is not None:
                loader.close()

    @property
    def _epoch_has_steps_left(self) -> bool:
        limit = self._step_limit
        return limit is None or self.trainer.progress.num_steps_in_epoch < limit

    def _steps_of_epoch(self) -> int | None:
        # Once per epoch: the batches of one need not be as many as those of another.
        parameters = self.trainer.training_parameters
        return parameters.step_limit(self.train_loader.num_batches, self.window.size)

    @property
    def _has_epoch_to_finish(self) -> bool:
        """Whether an epoch is trained, but its end was not reached when the run was killed."""
        progress = self.trainer.progress
        is_trained = progress.last_batch_finished or progress.train_epoch_finished
        return progress.in_epoch and (is_trained or not self._epoch_has_steps_left)

    def _count_seconds(self) -> None:
        now = self._clock()
        self.trainer.progress.seconds += now - self._last_time
        self._last_time = now
