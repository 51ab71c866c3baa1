"""State of a trainer's models, optimizers and schedulers, by name."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dream_trainer.errors import ConfigError, UnknownComponentError
from dream_trainer.schedules import load_scheduler_state
from dream_trainer.world.component_state import (
    load_module_state,
    load_optimizer_state,
    module_problems,
    module_state,
    optimizer_problems,
    optimizer_state,
    parameter_names,
    parameters_of,
    state_template,
)
from dream_trainer.world.sharded import is_dtensor
from dream_trainer.world.wrappers import unwrap

if TYPE_CHECKING:
    from dream_trainer.storage import Like


@dataclass(frozen=True)
class Components:
    """Models, optimizers and schedulers of a trainer.

    Args:
        models: name -> model, as the user made it.
        optimizers: name -> optimizer, as the user made it.
        schedulers: name -> scheduler.
    """

    models: Mapping[str, nn.Module]
    optimizers: Mapping[str, Optimizer]
    schedulers: Mapping[str, LRScheduler]

    @classmethod
    def of(
        cls,
        models: Mapping[str, nn.Module],
        optimizers: Mapping[str, Optimizer],
        schedulers: Mapping[str, LRScheduler] | None,
    ) -> Components:
        """Components behind what Fabric wrapped."""
        return cls(
            {name: unwrap(model) for name, model in models.items()},
            {name: unwrap(optimizer) for name, optimizer in optimizers.items()},
            dict(schedulers or {}),
        )

    def state_dict(self) -> dict[str, Any]:
        """State by component name, then by parameter name. Tensors are not copied."""
        names = parameter_names(self.models)
        return {
            "models": self.model_states(),
            "optimizers": {
                name: optimizer_state(optimizer, names)
                for name, optimizer in self.optimizers.items()
            },
            "schedulers": {name: one.state_dict() for name, one in self.schedulers.items()},
        }

    def model_states(self) -> dict[str, dict[str, Any]]:
        """State of the models by name, then by parameter name. Tensors are not copied."""
        parameter_names(self.models)  # gathered parameters become shards again
        return {name: module_state(model) for name, model in self.models.items()}

    def problems(
        self,
        state: Mapping[str, Any],
        left_out: Mapping[str, Collection[str]] = MappingProxyType({}),
    ) -> list[str]:
        """What of a state does not fit, one sentence each, with its path.

        Args:
            state: by component name, then by parameter name.
            left_out: model -> parameters that may be missing in it.
        """
        names = parameter_names(self.models)
        problems = []
        for kind, own in self._kinds().items():
            saved = state.get(kind)
            if saved is None:
                problems.append(f"{kind}: missing in the state")
                continue
            problems += [f"{kind}.{n}: missing in the state" for n in own if n not in saved]
            problems += [f"{kind}.{n}: in the state only" for n in saved if n not in own]
            for name in (name for name in own if name in saved):
                found: list[str] = []
                if kind == "models":
                    found = module_problems(own[name], saved[name], left_out.get(name, ()))
                elif kind == "optimizers":
                    found = optimizer_problems(own[name], saved[name], names, self.models)
                problems += [f"{kind}.{name}.{problem}" for problem in found]
        return problems

    def load_state_dict(self, state: Mapping[str, Any], *, copies: bool = True) -> None:
        """Load what fits; the argument is not changed.

        Args:
            state: by component name, then by parameter name.
            copies: False lets components keep tensors of the state as their own.
        """
        names = parameter_names(self.models)
        for kind, own in self._kinds().items():
            # In the order of `own`: a set's order differs by rank, and spreading a tensor is a
            # collective.
            for name in (name for name in own if name in state.get(kind, {})):
                if kind == "models":
                    load_module_state(own[name], state[kind][name], copies=copies)
                elif kind == "optimizers":
                    load_optimizer_state(
                        own[name], state[kind][name], names, self.models, copies=copies
                    )
                else:
                    load_scheduler_state(own[name], copy.deepcopy(state[kind][name]))

    def template(self) -> Like:
        """Templates for reading a checkpoint: what is sharded here comes back sharded."""
        return state_template(self.models)

    def _kinds(self) -> dict[str, Mapping[str, Any]]:
        return {
            "models": self.models,
            "optimizers": self.optimizers,
            "schedulers": self.schedulers,
        }


def find_module(models: Mapping[str, nn.Module], fqn: str) -> nn.Module:
    """The module at ``"model.path.to.module"``.

    Raises:
        UnknownComponentError: there is none; the message names what exists.
    """
    name, _, path = fqn.partition(".")
    if name not in models:
        raise UnknownComponentError(
            f"no model {name!r} in {fqn!r}; there is: {', '.join(models) or 'none'}"
        )
    module, walked = models[name], name
    for part in path.split(".") if path else ():
        children = dict(module.named_children())
        if part not in children:
            raise UnknownComponentError(
                f"no module {part!r} in {walked}; there is: {', '.join(children) or 'none'}"
            )
        module, walked = children[part], f"{walked}.{part}"
    return module


def copy_of_unsharded(model: nn.Module, name: str) -> nn.Module:
    """A copy of a model in host memory.

    Raises:
        ConfigError: it is sharded or split; a copy of it would be, too.
    """
    if any(is_dtensor(parameter) for parameter in model.parameters()):
        raise ConfigError(
            name,
            ["it is sharded, and cannot be made whole again"],
            "Export on one process: any checkpoint loads with devices=1.",
        )
    return copy.deepcopy(model).cpu()


def trained_alone(
    models: Mapping[str, nn.Module], optimizers: Mapping[str, Optimizer]
) -> dict[str, nn.Module]:
    """Optimizer name -> the model whose parameters it has, where that is one model alone."""
    found = {}
    for name, optimizer in optimizers.items():
        own = set(map(id, parameters_of([optimizer])))
        trained = [
            model for model in models.values() if any(id(p) in own for p in model.parameters())
        ]
        if len(trained) == 1:
            found[name] = trained[0]
    return found
