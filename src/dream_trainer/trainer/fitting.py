"""`fit`, from launch to close."""

from __future__ import annotations

import time
import warnings
from typing import TYPE_CHECKING

from dream_trainer.callbacks import Timeline
from dream_trainer.callbacks.run_summary import RunSummary, end_line
from dream_trainer.errors import ConfigError
from dream_trainer.randomness import all_preserved
from dream_trainer.trainer.ranks_elsewhere import bring_back, run_on_ranks
from dream_trainer.trainer.restore import lock_run_directory, open_run_directory, restore_once
from dream_trainer.trainer.running import running
from dream_trainer.trainer.state import seed_rank

if TYPE_CHECKING:
    from dream_trainer.trainer.base import BaseTrainer


def fit(trainer: BaseTrainer) -> None:
    """See `BaseTrainer.fit`."""
    _require_a_fresh_one(trainer)
    if trainer.world.starts_functions:
        with all_preserved():
            bring_back(trainer, run_on_ranks(trainer, "fit"))
        return
    trainer.began = time.time()
    with running(trainer):
        trainer.stop_reason = None
        trainer.prepare()
        _open_run(trainer)
        trainer.is_fitting = True
        trainer.callbacks.pre_fit(trainer)
        _warn_of_lost_measurements(trainer)
        trainer.loop.sanity_check()
        # The streams of the first step depend on the seed, or on the checkpoint, alone.
        if not trainer.streams.take_up() and not trainer.progress.num_batches:
            seed_rank(trainer)
        trainer.loop.run()
        trainer.place.enter("end")
        trainer.callbacks.post_fit(trainer)
        trainer.checkpointer.wait()
    if not _has_summary(trainer):
        trainer.world.print(end_line(trainer, trainer.stop_reason or "done"))


def _require_a_fresh_one(trainer: BaseTrainer) -> None:
    """Refuse a run that nothing would end, and a trainer that cannot be used again."""
    if not trainer.training_parameters.is_limited:
        raise ConfigError(
            "training_parameters",
            ["n_epochs, max_steps and max_time are all None, so nothing ends the run"],
            "Set one of them.",
        )
    if trainer.is_in_step:
        raise RuntimeError(
            "an exception left this trainer in the middle of a training step. Make a new one: "
            "it continues from the last checkpoint."
        )
    if trainer.is_brought_back:
        raise RuntimeError(
            "the ranks of this trainer have ended; what is here is what they left. Make a new "
            "one: it continues from the last checkpoint."
        )


def _warn_of_lost_measurements(trainer: BaseTrainer) -> None:
    if trainer.measured.sources and not trainer.callbacks.of_kind(Timeline):
        warnings.warn(
            f"nobody takes what is measured ({', '.join(trainer.measured.sources)}): the run has "
            "no Timeline. Leave callbacks.timeline as it is, or add one under another name.",
            stacklevel=2,
        )


def _open_run(trainer: BaseTrainer) -> None:
    """Continue from what is on disk, with the run directory locked, and say so."""
    if trainer.writes_run_directory:
        lock_run_directory(trainer, create=False)
    was_restored = trainer.is_restored
    restore_once(trainer, read_only=False)
    if trainer.writes_run_directory:
        lock_run_directory(trainer, create=True)
        open_run_directory(trainer)
    if was_restored and trainer.progress.num_batches:
        trainer.origin = end_line(trainer, "going on")
    if trainer.origin and not _has_summary(trainer):
        trainer.world.print(trainer.origin)


def _has_summary(trainer: BaseTrainer) -> bool:
    """Whether a callback says how the run starts and ends."""
    return bool(trainer.callbacks.of_kind(RunSummary))
