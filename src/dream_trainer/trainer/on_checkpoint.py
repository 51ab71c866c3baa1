"""Evaluate on the weights of a checkpoint, and go on with the trainer's own as if nothing was."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dream_trainer.checkpointing.choice import ChosenCheckpoint, chosen_checkpoint
from dream_trainer.errors import StateError
from dream_trainer.storage import TreePath, read_outline, read_parts
from dream_trainer.trainer.state import layout_of
from dream_trainer.trainer.warm_start import on_every_rank, read_weights
from dream_trainer.world.component_state import load_module_state, load_rank_buffers
from dream_trainer.world.sharded import is_dtensor

if TYPE_CHECKING:
    from dream_trainer.trainer.base import BaseTrainer


@contextmanager
def weights_of(trainer: BaseTrainer, checkpoint: str | Path, purpose: str) -> Iterator[None]:
    """Put the weights of a checkpoint in place for a block. A collective.

    Weights, buffers and what callbacks hold of weights come from it; nothing else is touched. What
    was there is copied to host memory, this rank's shards of it, and put back to the bit.

    Args:
        trainer: set up.
        checkpoint: ``"best"``, ``"last"``, the name of a checkpoint of the run, or a path.
        purpose: what for, for the line that tells what was loaded.

    Raises:
        CheckpointError: it is damaged.
        ConfigError: there is none of that name.
        StateError: it does not fit.
    """
    # The copies of a save under way must be of the trainer's own weights.
    trainer.checkpointer.report(wait=True)
    store, parameters = trainer.checkpointer.store, trainer.checkpoint_parameters
    chosen = trainer.world.ranks.on_zero(lambda: chosen_checkpoint(store, parameters, checkpoint))
    own = _Own(trainer)
    try:
        _load(trainer, chosen)
        trainer.world.print(f"{purpose} on {chosen}")
        yield
    finally:
        own.put_back()


class _Own:
    """What a trainer had before: copies in host memory."""

    def __init__(self, trainer: BaseTrainer) -> None:
        self._trainer = trainer
        states = trainer.components.model_states()
        self._tensors = [(one, _on_host(one)) for one in _tensors(trainer)]
        self._extra = {
            model: copy.deepcopy({k: v for k, v in state.items() if k.endswith("_extra_state")})
            for model, state in states.items()
        }
        self._callbacks = {
            name: copy.deepcopy(one.state_dict())
            for name, one in trainer.callbacks.holding_weights().items()
        }
        self._metrics = copy.deepcopy(trainer.metrics.state_dict())

    def put_back(self) -> None:
        trainer = self._trainer
        trainer.components.model_states()  # what the evaluation gathered is of other weights
        with torch.no_grad():
            for tensor, value in self._tensors:
                _local(tensor).copy_(value)
        for model, extra in self._extra.items():
            if extra:
                load_module_state(trainer.components.models[model], extra)
        trainer.callbacks.load_state_dict(self._callbacks)
        trainer.metrics.load_state_dict(self._metrics)


def _tensors(trainer: BaseTrainer) -> list[Tensor]:
    """Parameters and buffers, each once."""
    models = trainer.components.models.values()
    everything = [t for model in models for t in (*model.parameters(), *model.buffers())]
    return list({id(one): one for one in everything}.values())


def _local(tensor: Tensor) -> Tensor:
    """This rank's part; writing to it does not count as a change of a frozen weight."""
    own: Tensor = tensor.data
    return own.to_local() if is_dtensor(own) else own


def _on_host(tensor: Tensor) -> Tensor:
    return _local(tensor).to("cpu", copy=True)


def _load(trainer: BaseTrainer, chosen: ChosenCheckpoint) -> None:
    found = on_every_rank(trainer.world, lambda: _read(trainer, chosen.path))
    models, buffers, callbacks, problems = found
    if problems:
        raise StateError(
            str(chosen.path),
            problems,
            "It is of another model, or from before this trainer trained what it leaves out: then "
            "make a new one. Nothing was loaded.",
        )
    for name, model in trainer.components.models.items():
        load_module_state(model, models[name], copies=False)
    load_rank_buffers(trainer.components.models, buffers)
    trainer.callbacks.load_state_dict(callbacks)


def _read(
    trainer: BaseTrainer, path: Path
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], list[str]]:
    """States of the models, this rank's own buffers, states of callbacks, and what does not fit."""
    outline, holding = _outline_of_run(path), trainer.callbacks.holding_weights()
    if outline is None:
        weights, unplaced = read_weights(path, trainer.components, {})
        nothing = {name: dict[str, Any]() for name in holding}
        return weights["models"], {}, nothing, unplaced + _of_models(trainer, weights, {})
    left_out = outline["trainer"].get("left_out", {})
    problems = _of_models(trainer, outline, left_out) + trainer.frozen_weights.problems(left_out)
    saved = [name for name in holding if name in outline["callbacks"]]
    if problems:
        return {}, {}, {}, problems
    places: list[TreePath] = [("models", name) for name in trainer.components.models]
    places += [("callbacks", name) for name in saved]
    parts = read_parts(path, places, trainer.components.template())
    buffers: dict[str, Any] = {}
    if outline["trainer"]["layout"] == layout_of(trainer):
        place: TreePath = ("trainer.buffers",)
        buffers = read_parts(path, [place], rank=trainer.world.rank)[place]
    models = {name: parts["models", name] for name in trainer.components.models}
    # One that was added later has nothing of this checkpoint: its models are used as they are.
    held = {name: parts["callbacks", name] if name in saved else {} for name in holding}
    return models, buffers, held, []


def _outline_of_run(path: Path) -> Mapping[str, Any] | None:
    """Names, shapes and plain data of a run's checkpoint; None if it is none of a run."""
    if not (path / "manifest.json").exists():
        return None
    outline = read_outline(path)
    is_run = isinstance(outline, Mapping) and {"trainer", "models", "callbacks"} <= outline.keys()
    return outline if is_run else None


def _of_models(
    trainer: BaseTrainer, state: Mapping[str, Any], left_out: Mapping[str, Any]
) -> list[str]:
    problems = trainer.components.problems({"models": state["models"]}, left_out)
    return [problem for problem in problems if problem.startswith("models")]
