"""A trainer's whole state: gathered, checked, applied."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dream_trainer.callbacks import MetricLogger
from dream_trainer.errors import NonFiniteError, StateError
from dream_trainer.progress import Progress
from dream_trainer.randomness import derive, seed_everything, set_rng_state
from dream_trainer.trainer.finiteness import first_nonfinite_on_rank
from dream_trainer.trainer.frozen_weights import Checksums, without
from dream_trainer.world.component_state import load_training_condition, training_condition
from dream_trainer.world.gradient_sync import keep_reducing_gradients
from dream_trainer.world.window_gradients import load_window_gradients, window_gradients

if TYPE_CHECKING:
    from dream_trainer.trainer.base import BaseTrainer

_PARTS = ("trainer", "dataloaders", "callbacks", "precision", "rng")
_KNOWN = {*_PARTS, "models", "optimizers", "schedulers"}


class OwnState(dict[str, Any]):
    """A state that nobody else has: a trainer may keep its tensors instead of copying them."""


def gather_state(trainer: BaseTrainer) -> dict[str, Any]:
    """See `state_dict`."""
    if trainer.is_in_step:
        raise RuntimeError(
            "the state cannot be taken inside a training step: the batch would count as trained "
            "on. Take it in post_train_step, or better in on_boundary."
        )
    if trainer.loop.is_evaluating:
        raise RuntimeError(
            "the state cannot be taken between the batches of a validation: streams and modes are "
            "those of the validation. Take it in post_validation_epoch, or better in on_boundary."
        )
    for logger in trainer.callbacks.of_kind(MetricLogger).values():
        logger.collect(trainer)
    models = trainer.components.models
    is_in_window = trainer.progress.num_batches_in_window > 0
    components = trainer.components.state_dict()
    left_out: Checksums = {}
    if not trainer.checkpoint_parameters.save_frozen:
        left_out = trainer.frozen_weights.checksums()
        components["models"] = without(components["models"], left_out)
    return {
        "trainer": {
            "progress": trainer.progress.state_dict(),
            "seed": trainer.seed,
            "layout": layout_of(trainer),
            "stop_reason": trainer.stop_reason,
            "window": _window_state(trainer) if is_in_window else {},
            "validation_results": dict(trainer.validation_results),
            "metrics": trainer.metrics.state_dict(),
            "logged": trainer.logged.state_dict(),
            "monitored": trainer.monitored.state_dict(),
            "monitored_by_all": trainer.monitored.totals_over_ranks(),
            "training_means": dict(trainer.monitored.means),
            "schedules": trainer.scheduler_steps.state_dict(),
            "left_out": left_out,
            **training_condition(
                models, has_ranks=trainer.world.size > 1, sharded_only=is_in_window
            ),
        },
        **components,
        "dataloaders": {"train": trainer.loop.train_loader.state_dict()},
        "callbacks": trainer.callbacks.state_dict(),
        "precision": trainer.world.precision_state(),
        "rng": {"rank": trainer.world.rank, **trainer.streams.state()},
    }


def apply_state(trainer: BaseTrainer, state: Mapping[str, Any], strict: bool) -> None:
    """See `load_state_dict`."""
    is_same_rank, copies = _is_same_rank(trainer, state), not isinstance(state, OwnState)
    if not is_same_rank:
        state = _before_window(state)
    left_out = state.get("trainer", {}).get("left_out", {})
    problems = trainer.components.problems(state, left_out)
    problems += trainer.frozen_weights.problems(left_out)
    problems += [f"{part}: missing in the state" for part in _PARTS if part not in state]
    problems += [f"{part}: in the state only" for part in state if part not in _KNOWN]
    if problems and strict:
        raise StateError(
            "state_dict", problems, "Pass strict=False to load what fits; nothing was loaded."
        )
    if "train" in state.get("dataloaders", {}):
        try:
            # First, because it refuses other data; then nothing is loaded yet.
            allow = trainer.checkpoint_parameters.allow_changed
            trainer.loop.train_loader.load_state_dict(state["dataloaders"]["train"], allow)
        except StateError as error:
            if strict:
                raise
            problems += [f"dataloaders.train: {problem}" for problem in error.problems]
    if problems:
        warnings.warn("not loaded:\n  - " + "\n  - ".join(problems), stacklevel=3)
    trainer.components.load_state_dict(state, copies=copies)
    own = state.get("trainer", {})
    trainer.progress.load_state_dict(own.get("progress", {}))
    trainer.callbacks.load_state_dict(state.get("callbacks", {}), copies=copies)
    trainer.world.load_precision_state(state.get("precision", {}))
    models = trainer.components.models
    load_training_condition(models, own, is_same_rank=is_same_rank)
    if "stop_reason" not in trainer.checkpoint_parameters.allow_changed:
        trainer.stop_reason = own.get("stop_reason")
    trainer.validation_results = dict(own.get("validation_results", {}))
    trainer.monitored.means = dict(own.get("training_means", {}))
    trainer.scheduler_steps.load_state_dict(own.get("schedules", {}))
    trainer.monitored.load_totals(own.get("monitored_by_all", {}))
    trainer.window.load_state_dict({})
    if trainer.guard is not None:
        in_window = own.get("window") or {} if is_same_rank else {}
        trainer.guard.load_state_dict(in_window.get("guard", {}))
    if is_same_rank:
        trainer.metrics.load_state_dict(own.get("metrics", {}))
        trainer.monitored.load_state_dict(own.get("monitored", {}))
        trainer.logged.load_state_dict(copy.deepcopy(own.get("logged", {})))
        if window := own.get("window"):
            trainer.window.load_state_dict(window)
            load_window_gradients(models, window["gradients"])
            keep_reducing_gradients(trainer.sync_modules)
    rng = state.get("rng", {})
    if rng.get("rank") == trainer.world.rank:
        set_rng_state(rng)
    else:
        # Another rank's streams would give two ranks the same dropout.
        seed_rank(trainer)


def layout_of(trainer: BaseTrainer) -> dict[str, Any]:
    """Under what ranks a state is taken; parts that differ by rank fit the same ones only."""
    world = trainer.world
    return {
        "world_size": world.size,
        "dp_size": world.dp_size,
        "strategy": type(world.strategy).__name__,
    }


def _is_same_rank(trainer: BaseTrainer, state: Mapping[str, Any]) -> bool:
    """Whether the parts of a state that differ by rank are those of this one."""
    return bool(
        state.get("trainer", {}).get("layout") == layout_of(trainer)
        and state.get("rng", {}).get("rank") == trainer.world.rank
    )


def _window_state(trainer: BaseTrainer) -> dict[str, Any]:
    gradients = window_gradients(trainer.components.models)
    guard = {} if trainer.guard is None else {"guard": trainer.guard.state_dict()}
    return {**trainer.window.state_dict(), "gradients": gradients, **guard}


def _before_window(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state as if the unfinished window had not begun.

    Its gradients are those of ranks that are no longer there. The window is done again, so that
    every sample is still part of exactly one step.
    """
    own = state.get("trainer", {})
    if not (window := own.get("window")):
        return state
    progress = Progress()
    progress.load_state_dict(own["progress"])
    progress.take_back(window["num_batches"])
    loaders = {name: dict(loader) for name, loader in state.get("dataloaders", {}).items()}
    if (train := loaders.get("train")) is not None:
        if "loader" in train:
            warnings.warn(
                f"{window['num_batches']} batches are in no step: the checkpoint lies inside an "
                "accumulation window of other ranks, and a loader with a state of its own cannot "
                "go back to the window's beginning.",
                stacklevel=4,
            )
        used = "num_samples_used" if train["unit"] == "samples" else "num_batches"
        train["position"] -= window[used]
    return {
        **state,
        "trainer": {**own, "progress": progress.state_dict(), "window": {}},
        "dataloaders": loaders,
    }


def seed_rank(trainer: BaseTrainer) -> None:
    """Seed every stream from the run's seed, the step and this rank.

    Ranks that share samples (tensor parallel) share the streams; the others differ.
    """
    seed_everything(derive(trainer.seed, "train", trainer.global_step, trainer.world.dp_rank))


def first_nonfinite(trainer: BaseTrainer) -> str | None:
    """Name of the first parameter, or optimizer state, that is not finite on any rank."""
    own = first_nonfinite_on_rank(trainer.components)
    return next((name for name in trainer.world.all_gather_object(own) if name is not None), None)


def check_finite(trainer: BaseTrainer) -> None:
    """Refuse a state with NaN or infinity in parameters or optimizer state.

    Raises:
        NonFiniteError: on every rank, if something on any rank is not finite.
    """
    if (bad := first_nonfinite(trainer)) is not None:
        raise NonFiniteError(
            f"{bad} is not finite at step {trainer.global_step} (epoch "
            f"{trainer.current_epoch}); no checkpoint was written. The newest one is from before."
        )
