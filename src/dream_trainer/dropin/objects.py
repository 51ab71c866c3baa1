"""What belongs to a run, by the names that its program gives."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dream_trainer.dropin.reading import Reading, is_loader, keeps_state, reading_of
from dream_trainer.errors import ConfigError
from dream_trainer.trainer.components import Components
from dream_trainer.world.component_state import load_training_condition, training_condition
from dream_trainer.world.gradient_sync import keep_reducing_gradients
from dream_trainer.world.window_gradients import load_window_gradients, window_gradients

if TYPE_CHECKING:
    from dream_trainer.storage import Like
    from dream_trainer.world import DreamWorld


class NamedObjects:
    """Models, optimizers, schedulers and the rest, with their state.

    Args:
        objects: by name.

    Raises:
        ConfigError: some are of no kind that can be put back.
    """

    def __init__(self, objects: Mapping[str, Any]) -> None:
        found: dict[type, dict[str, Any]] = {nn.Module: {}, Optimizer: {}, LRScheduler: {}}
        self._others: dict[str, Any] = {}
        self._loaders: dict[int, Reading] = {}
        problems = []
        for name, one in objects.items():
            kind = next((kind for kind in found if isinstance(one, kind)), None)
            if kind is not None:
                found[kind][name] = one
            elif isinstance(one, (dict, list)):
                self._others[name] = one
            elif is_loader(one):
                self._others[name] = self._loaders[id(one)] = reading_of(one)
            elif keeps_state(one):
                self._others[name] = one
            else:
                problems.append(f"{name} is a {type(one).__name__}, which has no load_state_dict")
        if problems:
            raise ConfigError(
                "ResumableRun",
                problems,
                "A number that changes goes into a dict: progress={'best': 0.0}.",
            )
        self.given_models: list[nn.Module] = list(found[nn.Module].values())
        self._components = Components.of(found[nn.Module], found[Optimizer], found[LRScheduler])

    def reading_of(self, loader: Any) -> Reading | None:
        """How a loader that has a name is read; None if it has none."""
        return self._loaders.get(id(loader))

    @property
    def optimizers(self) -> list[Optimizer]:
        """As the user made them."""
        return list(self._components.optimizers.values())

    def template(self) -> Like:
        """Templates for reading a checkpoint: what is sharded here comes back sharded."""
        return self._components.template()

    def state_dict(self, world: DreamWorld) -> dict[str, Any]:
        """Their state, between two batches. Parts of it differ by rank."""
        models = self._components.models
        others = {name: _state_of(one) for name, one in self._others.items()}
        return {
            **self._components.state_dict(),
            "others": others,
            "trainer": {
                **training_condition(models, has_ranks=world.size > 1, sharded_only=True),
                "window": {
                    "gradients": window_gradients(models),
                    # A replay buffer, say, is a rank's own.
                    "others": others if world.size > 1 else {},
                },
            },
        }

    def problems(self, state: Mapping[str, Any]) -> list[str]:
        """What of a state does not fit, one sentence each."""
        saved = state.get("others", {})
        problems = self._components.problems(state)
        problems += [f"{name}: missing in the state" for name in self._others if name not in saved]
        problems += [f"{name}: in the state only" for name in saved if name not in self._others]
        return problems

    def load_state_dict(self, state: Mapping[str, Any], *, is_same_rank: bool) -> None:
        """Put everything back; the state is not changed.

        Args:
            state: what `state_dict` gave.
            is_same_rank: whether what differs by rank is this one's.
        """
        models, own = self._components.models, state["trainer"]
        self._components.load_state_dict(state)
        others = {**state["others"], **(own["window"]["others"] if is_same_rank else {})}
        for name, one in self._others.items():
            _load(one, copy.deepcopy(others[name]))
        load_training_condition(models, own, is_same_rank=is_same_rank)
        if is_same_rank:
            load_window_gradients(models, own["window"]["gradients"])
            keep_reducing_gradients(self.given_models)


def _state_of(one: Any) -> Any:
    return copy.deepcopy(one if isinstance(one, (dict, list)) else one.state_dict())


def _load(one: Any, state: Any) -> None:
    if isinstance(one, dict):
        one.clear()
        one.update(state)
    elif isinstance(one, list):
        one[:] = state
    else:
        one.load_state_dict(state)


__all__ = ["NamedObjects"]
