"""A fresh run that starts from the weights of another one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from dream_trainer.checkpointing.weight_names import averaged_places, match
from dream_trainer.checkpointing.weights import open_weights, weights_path
from dream_trainer.errors import ProblemsError, StateError
from dream_trainer.storage import TreePath
from dream_trainer.trainer.components import Components
from dream_trainer.world import DreamWorld
from dream_trainer.world.component_state import clean_name

if TYPE_CHECKING:
    from dream_trainer.trainer.base import BaseTrainer

T = TypeVar("T")


def load_weights(trainer: BaseTrainer, given: str) -> None:
    """Load the weights at a path into the models, and tell it in one line.

    Every rank calls it, and every rank raises if one does; then nothing has been loaded.

    Args:
        trainer: set up; its ``checkpoint_parameters`` say how names are changed and whether
            everything must fit.
        given: one of the forms of ``init_from``.

    Raises:
        CheckpointError: it cannot be read, or not without running code.
        ConfigError: an entry of ``init_rename`` matches nothing.
        StateError: not everything fits, or without ``init_strict`` nothing does.
    """
    world, parameters = trainer.world, trainer.checkpoint_parameters
    path = world.ranks.on_zero(lambda: weights_path(Path(given)))
    rename = {
        str(old): new if new is None else str(new) for old, new in parameters.init_rename.items()
    }
    average = parameters.init_from_average
    weights, unplaced = on_every_rank(
        world, lambda: read_weights(path, trainer.components, rename, average)
    )
    problems = unplaced + [
        problem for problem in trainer.components.problems(weights) if problem.startswith("models")
    ]
    num_own = sum(len(state) for state in trainer.components.state_dict()["models"].values())
    num_fitting = num_own - len(problems) + len(unplaced)
    if problems and (parameters.init_strict or not num_fitting):
        raise StateError(
            str(path),
            problems,
            "Nothing was loaded. Rename or leave out parts with checkpoint_parameters.init_rename, "
            "or load what fits with init_strict=False.",
        )
    if problems and world.is_global_zero:
        warnings.warn(f"not loaded from {path}:\n  - " + "\n  - ".join(problems), stacklevel=2)
    trainer.components.load_state_dict(weights, copies=False)  # they were read for this
    kind = "weights" if average is None else f"averaged weights ({average})"
    world.print(f"{kind} from {path}: {num_fitting} of {num_own}")


def read_weights(
    path: Path,
    components: Components,
    rename: Mapping[str, str | None],
    average: str | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """State of the models as far as there is one, and the weights that have no place in it.

    Args:
        path: what `weights_path` gave.
        components: whose names and sharding the state has.
        rename: see ``init_rename``.
        average: name of the callback whose averages are read where it has some.
    """
    source = open_weights(path)
    own: dict[str, tuple[str, str]] = {
        f"{model}.{name}": (model, name)
        for model, state in components.state_dict()["models"].items()
        for name in state
    }
    matched = match(source.tree, own, list(components.models), rename, str(path))
    averages = {} if average is None else averaged_places(source.tree, average, str(path))
    places = {name: averages.get(place, place) for name, place in matched.places.items()}
    target_of = {place: own[name] for name, place in places.items()}
    template = components.template()

    def like(place: TreePath, size: torch.Size) -> Tensor | None:
        target = target_of.get(place)  # tensors inside an extra state have none
        return template(("models", *target), size) if target else None

    values = source.read(target_of, like)
    models: dict[str, dict[str, Any]] = {model: {} for model in components.models}
    ties = _ties(components.models)
    # In the order of the trainer's own names, the same on every rank: spreading a tensor is a
    # collective.
    for full, (model, name) in own.items():
        sources = [one for one in (full, *ties.get(full, ())) if one in places]
        if sources:
            models[model][name] = values[places[sources[0]]]
    return {"models": models}, matched.problems


def _ties(models: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """Names of one and the same parameter; files often have it under one of them only."""
    names: dict[int, list[str]] = {}
    for model_name, model in models.items():
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(f"{model_name}.{clean_name(name)}")
    return {name: shared for shared in names.values() if len(shared) > 1 for name in shared}


def on_every_rank(world: DreamWorld, function: Callable[[], T]) -> T:
    """The result of this rank; if it failed on any rank, the error is raised on all of them."""
    result, failure = None, None
    try:
        result = function()
    except ProblemsError as error:
        failure = error
    failures = [one for one in world.all_gather_object(failure) if one is not None]
    if failures:
        raise failures[0]
    return result  # type: ignore[return-value]
