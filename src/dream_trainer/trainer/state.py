"""A trainer's whole state: gathered, checked, applied."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dream_trainer.callbacks import MetricLogger
from dream_trainer.errors import NonFiniteError, StateError
from dream_trainer.randomness import derive, rng_state, seed_everything, set_rng_state
from dream_trainer.trainer.finiteness import first_nonfinite
from dream_trainer.world.component_state import (
    gradients_by_name,
    load_gradients,
    load_rank_buffers,
    rank_buffers,
)

if TYPE_CHECKING:
    from dream_trainer.trainer.base import BaseTrainer

_PARTS = ("trainer", "dataloaders", "callbacks", "precision", "rng")
_KNOWN = {*_PARTS, "models", "optimizers", "schedulers"}


def gather_state(trainer: BaseTrainer) -> dict[str, Any]:
    """See `state_dict`."""
    if trainer.progress.num_batches_in_window:
        raise RuntimeError(
            "the state cannot be taken inside an accumulation window: its gradients would be "
            "lost. Take it when is_accumulating_gradients is False."
        )
    if trainer.is_in_step:
        raise RuntimeError(
            "the state cannot be taken inside a training step: the batch would count as trained "
            "on. Take it in post_train_step, or better in on_boundary."
        )
    for name in trainer.callbacks:
        if isinstance(callback := trainer.callbacks[name], MetricLogger):
            callback.flush(trainer)  # rows of earlier steps must not depend on a later one
    return {
        "trainer": {
            "progress": trainer.progress.state_dict(),
            "seed": trainer.seed,
            "world_size": trainer.world.size,
            "gradients": gradients_by_name(trainer.components.models),
            "metrics": trainer.metrics.state_dict(),
            "buffers": rank_buffers(trainer.components.models) if trainer.world.size > 1 else {},
        },
        **trainer.components.state_dict(),
        "dataloaders": {"train": trainer.loop.train_loader.state_dict()},
        "callbacks": trainer.callbacks.state_dict(),
        "precision": trainer.world.precision_state(),
        "rng": {"rank": trainer.world.rank, **rng_state()},
    }


def apply_state(trainer: BaseTrainer, state: Mapping[str, Any], strict: bool) -> None:
    """See `load_state_dict`."""
    problems = trainer.components.problems(state)
    problems += [f"{part}: missing in the state" for part in _PARTS if part not in state]
    problems += [f"{part}: in the state only" for part in state if part not in _KNOWN]
    if problems and strict:
        raise StateError(
            "state_dict", problems, "Pass strict=False to load what fits; nothing was loaded."
        )
    if "train" in state.get("dataloaders", {}):
        try:
            # First, because it refuses other data; then nothing is loaded yet.
            trainer.loop.train_loader.load_state_dict(state["dataloaders"]["train"])
        except StateError as error:
            if strict:
                raise
            problems += [f"dataloaders.train: {problem}" for problem in error.problems]
    if problems:
        warnings.warn("not loaded:\n  - " + "\n  - ".join(problems), stacklevel=3)
    trainer.components.load_state_dict(state)
    own = state.get("trainer", {})
    trainer.progress.load_state_dict(own.get("progress", {}))
    trainer.callbacks.load_state_dict(state.get("callbacks", {}))
    trainer.world.load_precision_state(state.get("precision", {}))
    load_gradients(trainer.components.models, own.get("gradients", {}))
    rng = state.get("rng", {})
    if rng.get("rank") != trainer.world.rank:
        # Another rank's streams would give two ranks the same dropout.
        seed_rank(trainer)
    else:
        set_rng_state(rng)
        if own.get("world_size") == trainer.world.size:
            trainer.metrics.load_state_dict(own.get("metrics", {}))
            load_rank_buffers(trainer.components.models, own.get("buffers", {}))


def seed_rank(trainer: BaseTrainer) -> None:
    """Seed every stream from the run's seed, the step and this rank.

    Ranks that share samples (tensor parallel) share the streams; the others differ.
    """
    seed_everything(derive(trainer.seed, "train", trainer.global_step, trainer.world.dp_rank))


def check_finite(trainer: BaseTrainer) -> None:
    """Refuse a state with NaN or infinity in parameters or optimizer state.

    Raises:
        NonFiniteError: on every rank, if something on any rank is not finite.
    """
    bad = first_nonfinite(trainer.components)
    found = [name for name in trainer.world.all_gather_object(bad) if name is not None]
    if found:
        raise NonFiniteError(
            f"{found[0]} is not finite at step {trainer.global_step} (epoch "
            f"{trainer.current_epoch}); no checkpoint was written. The newest one is from before."
        )
