"""Unfreeze: parts of a model that wait, frozen, for their epoch or step."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from dream_trainer.callbacks.callback import Callback
from dream_trainer.errors import ConfigError, UnknownComponentError
from dream_trainer.schedules import follow_new_groups, scale_rates
from dream_trainer.world.component_state import clean_name, parameter_names, parameters_of

if TYPE_CHECKING:
    from dream_trainer.trainer.base import BaseTrainer

#: Rates that torch's optimizers and schedulers keep in a parameter group.
_RATES = ("lr", "initial_lr", "max_lr", "min_lr")
_NAMES = "param_names"


@dataclass(frozen=True)
class Unfreezing:
    """When a part of a model begins to train, and how."""

    epoch: int | None = None
    """From the beginning of this epoch on, counted from 0."""
    step: int | None = None
    """After this many optimizer steps. Either this or ``epoch`` is given."""
    lr_scale: float = 1.0
    """Its learning rates are this share of those that its parameters would have otherwise, at all
    times: schedules go on for both."""
    eval_mode: bool = False
    """Whether its modules are in eval mode until then, so that the statistics of batch norm stay
    as they are and dropout is off."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Other settings of its parameter groups, ``{"weight_decay": 0.0}`` for example."""

    def problems(self) -> list[str]:
        """What is wrong with the values, one sentence each."""
        problems = []
        given = [n for n in ("epoch", "step") if getattr(self, n) is not None]
        if len(given) != 1:
            problems.append("exactly one of epoch and step says when")
        problems += [
            f"{name}={getattr(self, name)!r} is not a whole number above 0"
            for name in given
            if type(getattr(self, name)) is not int or getattr(self, name) < 1
        ]
        if not self.lr_scale > 0:
            problems.append(f"lr_scale={self.lr_scale!r} is not above 0")
        problems += [
            f"options has {name!r}; lr_scale sets the learning rate"
            for name in self.options
            if name in (*_RATES, "params", _NAMES)
        ]
        return problems

    def is_due(self, epoch: int, step: int) -> bool:
        """Whether its time has come.

        Args:
            epoch: under way, or about to begin.
            step: optimizer steps taken.
        """
        return epoch >= self.epoch if self.epoch is not None else step >= (self.step or 0)


class Unfreeze(Callback):
    """Freezes parts of models before the optimizers are made, and unfreezes each at its time.

    Each part has parameter groups of its own from the beginning: taken out of those that
    ``configure_optimizers`` made, or added to the optimizer of its model where that leaves out
    what is frozen. Without gradients nothing happens to them. So a checkpoint from before a part
    is unfrozen fits as well as one from after it, and schedules drive all groups all the time.

    Args:
        parts: ``"model.path.to.module"`` -> when. Of two that hold the same parameter the longer
            path counts.

    Raises:
        ConfigError: with all problems of the values at once.
    """

    def __init__(self, parts: Mapping[str, Unfreezing]) -> None:
        problems = [] if parts else ["it names no part"]
        for name, one in parts.items():
            found = one.problems() if isinstance(one, Unfreezing) else ["not an Unfreezing"]
            problems += [f"{name}: {problem}" for problem in found]
        if problems:
            raise ConfigError(
                "Unfreeze", problems, 'Write {"model.backbone": Unfreezing(epoch=2)}, for example.'
            )
        self.parts = dict(parts)
        self._waiting = list(self.parts)

    def post_configure(self, trainer: BaseTrainer) -> None:
        """Freeze the parts.

        Raises:
            ConfigError: a part is not there, or has no parameter.
        """
        self._waiting = list(self.parts)  # another trainer may have had this callback
        models, problems = trainer.named_models(), []
        frozen = dict.fromkeys(self.parts, 0)
        for part, parameter in self._parameters(models):
            parameter.requires_grad_(False)
            frozen[part] += 1
        for name, number in frozen.items():
            try:
                trainer.get_module(name)
            except UnknownComponentError as error:
                problems.append(str(error))
                continue
            if not number:
                problems.append(f"{name} has no parameter that is in no other part")
        if problems:
            raise ConfigError("Unfreeze", problems)
        for part, module in self._modules(models):
            module.training = module.training and not self.parts[part].eval_mode

    def post_setup(self, trainer: BaseTrainer) -> None:
        """Give each part its parameter groups.

        Raises:
            ConfigError: it is not clear which optimizer trains a part.
        """
        components = trainer.components
        parts = {id(p): part for part, p in self._parameters(components.models)}
        for optimizer in components.optimizers.values():
            schedulers = trainer.schedulers_of(optimizer)
            for part in self.parts:
                for index in range(len(optimizer.param_groups)):
                    self._split(part, parts, optimizer, index, schedulers)
        self._add_missing(trainer)

    def pre_fit(self, trainer: BaseTrainer) -> None:
        """The run may go on with parts that are due by now."""
        self._unfreeze_due(trainer)

    def on_boundary(self, trainer: BaseTrainer) -> None:
        """Unfreeze what is due: no window is open, and the checkpoint of this moment has it."""
        if self._waiting:
            self._unfreeze_due(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Which parts wait; what is frozen is in the trainer's state."""
        return {"waiting": list(self._waiting)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self._waiting = [name for name in self.parts if name in state_dict["waiting"]]

    def _unfreeze_due(self, trainer: BaseTrainer) -> None:
        epoch, step = trainer.current_epoch, trainer.global_step
        due = [name for name in self._waiting if self.parts[name].is_due(epoch, step)]
        if not due:
            return
        models = trainer.components.models
        for part, parameter in self._parameters(models):
            if part in due:
                parameter.requires_grad_(True)
        for part, module in self._modules(models):
            if part in due and self.parts[part].eval_mode:
                module.training = True
        self._waiting = [name for name in self._waiting if name not in due]

    def _parameters(self, models: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
        """Each parameter that is in a part, with the part."""
        names = parameter_names(models)
        for model in models.values():
            for parameter in model.parameters():
                if (part := self._part_of(names[id(parameter)])) is not None:
                    yield part, parameter

    def _modules(self, models: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
        """Each module that is in a part, with the part."""
        for model_name, model in models.items():
            for path, module in model.named_modules():
                name = clean_name(f"{model_name}.{path}.").rstrip(".")
                if (part := self._part_of(name)) is not None:
                    yield part, module

    def _part_of(self, name: str) -> str | None:
        found = [part for part in self.parts if f"{name}.".startswith(f"{part}.")]
        return max(found, key=len, default=None)

    def _split(
        self,
        part: str,
        parts: Mapping[int, str],
        optimizer: Optimizer,
        index: int,
        schedulers: list[Any],
    ) -> None:
        """Give the parameters of a part that are in a group one of their own."""
        how, group = self.parts[part], optimizer.param_groups[index]
        is_own = [parts.get(id(p)) == part for p in group["params"]]
        if not any(is_own):
            return
        if all(is_own):
            group.update(_scaled(group, how))
            for scheduler in schedulers:
                scale_rates(scheduler, index, how.lr_scale)
            return
        kept = {key: _chosen(group, key, is_own, False) for key in ("params", _NAMES)}
        moved = {key: _chosen(group, key, is_own, True) for key in ("params", _NAMES)}
        group.update({key: value for key, value in kept.items() if key in group})
        _add_group(optimizer, {**group, **moved}, index, how, schedulers)

    def _add_missing(self, trainer: BaseTrainer) -> None:
        """Groups for what no optimizer was given, because it was frozen when they were made."""
        models, optimizers = trainer.components.models, trainer.components.optimizers
        names = parameter_names(models)
        trained = {name: set(map(id, parameters_of([o]))) for name, o in optimizers.items()}
        everything = set().union(*trained.values())
        problems = []
        for part in self.parts:
            missing = [
                parameter
                for owner, parameter in self._parameters(models)
                if owner == part and id(parameter) not in everything
            ]
            if not missing:
                continue
            model = part.partition(".")[0]
            found = [
                name
                for name, ids in trained.items()
                if any(names.get(one, "").partition(".")[0] == model for one in ids)
            ]
            if len(found) != 1:
                which = " and ".join(found) or "no optimizer"
                problems.append(f"{part}: {which} could train it")
                continue
            optimizer = optimizers[found[0]]
            schedulers = trainer.schedulers_of(optimizer)
            like = self._first_group_of_no_part(optimizer, names)
            group = {**optimizer.param_groups[like], "params": missing}
            if _NAMES in group:
                group[_NAMES] = [names[id(p)].partition(".")[2] for p in missing]
            _add_group(optimizer, group, like, self.parts[part], schedulers)
        if problems:
            raise ConfigError(
                "Unfreeze",
                problems,
                "Give its parameters to an optimizer in configure_optimizers, frozen as they are.",
            )

    def _first_group_of_no_part(self, optimizer: Optimizer, names: Mapping[int, str]) -> int:
        """The one whose rates nobody has scaled; 0 if there is none."""
        for index, group in enumerate(optimizer.param_groups):
            if any(self._part_of(names.get(id(p), "")) is None for p in group["params"]):
                return index
        return 0


def _scaled(group: Mapping[str, Any], how: Unfreezing) -> dict[str, Any]:
    rates = {name: group[name] * how.lr_scale for name in _RATES if name in group}
    return {**rates, **copy.deepcopy(dict(how.options))}


def _chosen(group: Mapping[str, Any], key: str, is_own: list[bool], wanted: bool) -> list[Any]:
    values = group.get(key, ())
    return [one for one, own in zip(values, is_own, strict=False) if own == wanted]


def _add_group(
    optimizer: Optimizer,
    group: dict[str, Any],
    like: int,
    how: Unfreezing,
    schedulers: list[Any],
) -> None:
    """Add a group of parameters; its rates follow those of another one."""
    number = len(optimizer.param_groups)
    made = {**group, **_scaled(group, how)}
    if names := made.pop(_NAMES, None):
        made["params"] = list(zip(names, made["params"], strict=True))
    optimizer.add_param_group(made)
    for scheduler in schedulers:
        follow_new_groups(scheduler, number, [(like, how.lr_scale)])
