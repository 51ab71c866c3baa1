"""State of modules and optimizers by parameter name, the same under every strategy."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dream_trainer.world.sharded import is_dtensor, is_fsdp_module

#: What wrappers of torch put into names; the user's own names are those without.
_INFIXES = ("_orig_mod.", "_checkpoint_wrapped_module.")


def clean_name(name: str) -> str:
    """A parameter's name without what compilation and activation checkpointing put into it."""
    for infix in _INFIXES:
        name = name.replace(infix, "")
    return name


def parameter_names(models: Mapping[str, nn.Module]) -> dict[int, str]:
    """``id(parameter) -> "model.name"`` for every parameter of the models.

    A parameter that several modules share has its first name.
    """
    names: dict[int, str] = {}
    for name, parameter in every_parameter(models):
        names.setdefault(id(parameter), name)
    return names


def module_state(module: nn.Module) -> dict[str, Any]:
    """Parameters and buffers by name: detached, not copied, sharded ones as DTensors."""
    return {clean_name(name): value for name, value in module.state_dict().items()}


def rank_buffers(models: Mapping[str, nn.Module]) -> dict[str, dict[str, Tensor]]:
    """Buffers that each rank has of its own, by model and name.

    Batch norm's statistics follow a rank's own samples; only DDP makes them equal, now and then.
    """
    return {
        model_name: {
            clean_name(name): value
            for name, value in model.state_dict().items()
            if isinstance(value, Tensor) and not is_dtensor(value) and name in buffers
        }
        for model_name, model in models.items()
        if (buffers := {name for name, _ in model.named_buffers()})
    }


def load_rank_buffers(
    models: Mapping[str, nn.Module], state: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """The inverse of `rank_buffers`; what does not fit is passed over."""
    for model_name in models.keys() & state.keys():
        load_module_state(models[model_name], state[model_name])


def module_problems(
    module: nn.Module, state: Mapping[str, Any], left_out: Collection[str] = ()
) -> list[str]:
    """What of a state does not fit a module, one sentence each.

    Args:
        module: to load into.
        state: parameters and buffers by name.
        left_out: names that may be missing in it.
    """
    own = module_state(module)
    problems = [
        f"{name}: missing in the state"
        for name in own
        if name not in state and name not in left_out
    ]
    problems += [f"{name}: in the state, not in the model" for name in state if name not in own]
    for name in (name for name in own if name in state):
        if not _fits(state[name], own[name]):
            problems.append(
                f"{name}: {_described(state[name])} in the state, "
                f"{_described(own[name])} in the model"
            )
    return problems


def load_module_state(module: nn.Module, state: Mapping[str, Any], *, copies: bool = True) -> None:
    """Load what fits of a state that was made under this or any other strategy.

    Args:
        module: what to load into.
        state: parameters and buffers by name.
        copies: False lets the module keep what it is given, where it keeps anything at all.
    """
    own = {clean_name(name): (name, value) for name, value in module.state_dict().items()}
    fitting = {
        own[name][0]: laid_out_like(value, own[name][1], copies=copies)
        for name, value in state.items()
        if name in own and _fits(value, own[name][1])
    }
    module.load_state_dict(fitting, strict=False)


def optimizer_state(optimizer: Optimizer, names: Mapping[int, str]) -> dict[str, Any]:
    """State and parameter groups with parameters by name instead of by index."""
    state = optimizer.state_dict()
    by_index = _names_by_index(optimizer, names)
    own = state["state"]
    return {
        # Optimizers may keep more than torch's two entries, and state that is no parameter's.
        **{key: value for key, value in state.items() if key not in ("state", "param_groups")},
        "state": {by_index[i]: dict(own[i]) for i in own if i in by_index},
        "other_state": {key: value for key, value in own.items() if key not in by_index},
        "param_groups": [
            {**group, "params": [by_index[index] for index in group["params"]]}
            for group in state["param_groups"]
        ],
    }


def optimizer_problems(
    optimizer: Optimizer,
    state: Mapping[str, Any],
    names: Mapping[int, str],
    models: Mapping[str, nn.Module],
) -> list[str]:
    """What of a state does not fit an optimizer, one sentence each."""
    parameters = _parameters_by_name(optimizer, names)
    added = _added_groups(optimizer, state, names, models)
    parameters |= {name: p for group in added for name, p in group["params"].items()}
    saved = [name for group in state["param_groups"] for name in group["params"]]
    problems = [f"{name}: missing in the state" for name in parameters if name not in saved]
    problems += [f"{n}: in the state, not in the optimizer" for n in saved if n not in parameters]
    if len(state["param_groups"]) != len(optimizer.param_groups) + len(added):
        problems.append(
            f"param_groups: {len(state['param_groups'])} in the state, "
            f"{len(optimizer.param_groups)} in the optimizer"
        )
    for name in (name for name in parameters if name in state["state"]):
        problems += [
            f"{name}.{key}: {_described(value)} in the state, the parameter has "
            f"{_described(parameters[name])}"
            for key, value in state["state"][name].items()
            if not _fits_parameter(value, parameters[name])
        ]
    return problems


def load_optimizer_state(
    optimizer: Optimizer,
    state: Mapping[str, Any],
    names: Mapping[int, str],
    models: Mapping[str, nn.Module],
    *,
    copies: bool = True,
) -> None:
    """Load the state of the parameters that fit, and the settings of the groups.

    Groups that were added while the run went on are added here, too.

    Args:
        optimizer: what to load into.
        state: what `optimizer_state` gave, under any strategy.
        names: of the parameters here.
        models: which they belong to.
        copies: False lets the optimizer keep the tensors of the state as its own.
    """
    for group in _added_groups(optimizer, state, names, models):
        optimizer.add_param_group({**group, "params": list(group["params"].values())})
    parameters = _parameters_by_name(optimizer, names)
    indices = {name: index for index, name in enumerate(parameters)}
    entries = {
        indices[name]: {
            key: laid_out_like(value, parameters[name], copies=copies)
            for key, value in entry.items()
        }
        for name, entry in state["state"].items()
        if name in parameters
        and all(_fits_parameter(value, parameters[name]) for value in entry.values())
    }
    groups = copy.deepcopy(optimizer.state_dict()["param_groups"])
    for own, saved in zip(groups, state["param_groups"], strict=False):
        own.update({k: copy.deepcopy(v) for k, v in saved.items() if k != "params"})
    known = ("state", "other_state", "param_groups")
    rest = {key: copy.deepcopy(value) for key, value in state.items() if key not in known}
    other = copy.deepcopy(dict(state.get("other_state", {})))
    optimizer.load_state_dict({**rest, "state": {**other, **entries}, "param_groups": groups})
    for name, index in indices.items():
        loaded = optimizer.state.get(parameters[name], {})
        for key, value in entries.get(index, {}).items():
            if isinstance(value, Tensor) and loaded[key].dtype != value.dtype:
                # torch gives it the parameter's type, which can have fewer digits.
                loaded[key] = value.to(loaded[key].device)


def frozen_parameters(models: Mapping[str, nn.Module]) -> list[str]:
    """Names of the parameters that need no gradient; a callback may have frozen them."""
    return [
        f"{model_name}.{clean_name(name)}"
        for model_name, model in models.items()
        for name, parameter in model.named_parameters()
        if not parameter.requires_grad
    ]


def set_frozen_parameters(models: Mapping[str, nn.Module], names: Iterable[str]) -> None:
    """The inverse of `frozen_parameters`: the others need a gradient."""
    frozen = set(names)
    for model_name, model in models.items():
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(f"{model_name}.{clean_name(name)}" not in frozen)


def modules_in_eval_mode(models: Mapping[str, nn.Module]) -> list[str]:
    """Names of the modules that are not in training mode; a callback may have put them there."""
    return [
        clean_name(f"{model_name}.{name}.")
        for model_name, model in models.items()
        for name, part in model.named_modules()
        if not part.training
    ]


def set_eval_mode(models: Mapping[str, nn.Module], names: Iterable[str]) -> None:
    """The inverse of `modules_in_eval_mode`: the others are in training mode."""
    in_eval = set(names)
    for model_name, model in models.items():
        for name, part in model.named_modules():
            part.training = clean_name(f"{model_name}.{name}.") not in in_eval


def training_condition(
    models: Mapping[str, nn.Module], *, has_ranks: bool, sharded_only: bool
) -> dict[str, Any]:
    """What a training has made of models beside their state.

    Args:
        models: by name.
        has_ranks: whether there are several, whose buffers differ.
        sharded_only: see `gradients_by_name`.
    """
    return {
        "gradients": gradients_by_name(models, sharded_only=sharded_only),
        "frozen": frozen_parameters(models),
        "in_eval_mode": modules_in_eval_mode(models),
        "buffers": rank_buffers(models) if has_ranks else {},
    }


def load_training_condition(
    models: Mapping[str, nn.Module], state: Mapping[str, Any], *, is_same_rank: bool
) -> None:
    """The inverse of `training_condition`.

    Args:
        models: by name.
        state: from any ranks; parts may be missing.
        is_same_rank: whether the buffers are those of this one.
    """
    if "frozen" in state:
        set_frozen_parameters(models, state["frozen"])
        set_eval_mode(models, state["in_eval_mode"])
    load_gradients(models, state.get("gradients", {}))
    if is_same_rank:
        load_rank_buffers(models, state.get("buffers", {}))


def gradients_by_name(
    models: Mapping[str, nn.Module], *, sharded_only: bool = False
) -> dict[str, Tensor]:
    """Gradients that wait for a step to come, by parameter name; between steps usually none."""
    return {
        f"{model_name}.{clean_name(name)}": parameter.grad
        for model_name, model in models.items()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and (is_dtensor(parameter.grad) or not sharded_only)
    }


def load_gradients(models: Mapping[str, nn.Module], state: Mapping[str, Tensor]) -> None:
    """The inverse of `gradients_by_name`: parameters that are not in it have none."""
    for model_name, model in models.items():
        for name, parameter in model.named_parameters():
            value = state.get(f"{model_name}.{clean_name(name)}")
            fits = value is not None and value.shape == parameter.shape
            parameter.grad = laid_out_like(value, parameter).to(parameter.device) if fits else None


def state_template(
    models: Mapping[str, nn.Module],
) -> Callable[[tuple[str | int, ...], torch.Size], Tensor | None]:
    """Templates for reading: sharded models and their optimizer state come back sharded."""
    # By every name of a parameter that modules share: under a second one it would be read whole.
    sharded = {name: p for name, p in every_parameter(models) if is_dtensor(p)}

    def like(path: tuple[str | int, ...], size: torch.Size) -> Tensor | None:
        if not sharded:
            return None
        if path[0] == "models" and len(path) == 3:
            parameter = sharded.get(f"{path[1]}.{path[2]}")
        elif path[0] == "optimizers" and len(path) == 5:
            parameter = sharded.get(str(path[3]))
        elif path[:2] == ("trainer", "gradients"):
            parameter = sharded.get(str(path[2]))
        elif path[0] == "callbacks" and path[2:3] == ("models",) and len(path) == 5:
            # What a callback keeps for each weight: averages, for example.
            parameter = sharded.get(f"{path[3]}.{path[4]}")
        else:
            return None
        return parameter.detach() if parameter is not None and parameter.shape == size else None

    return like


def unsharded_norm(norm: Tensor) -> Tensor:
    """A gradient norm as a plain tensor of no dimensions. Sharded: one all-reduce."""
    return norm.full_tensor() if is_dtensor(norm) else norm


def parameters_of(optimizers: Iterable[Optimizer]) -> Iterator[nn.Parameter]:
    """The parameters that optimizers train, group by group."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            yield from group["params"]


def gradients(optimizers: Iterable[Optimizer]) -> list[Tensor]:
    """The gradients that optimizers would step with."""
    return [
        parameter.grad
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.grad is not None
    ]


def _added_groups(
    optimizer: Optimizer,
    state: Mapping[str, Any],
    names: Mapping[int, str],
    models: Mapping[str, nn.Module],
) -> list[dict[str, Any]]:
    """Groups that only the state has, of parameters that the optimizer does not have yet."""
    own = _parameters_by_name(optimizer, names)
    everyone = {names[id(p)]: p for model in models.values() for p in model.parameters()}
    further = state["param_groups"][len(optimizer.param_groups) :]
    if any(name in own or name not in everyone for group in further for name in group["params"]):
        return []
    return [
        {**copy.deepcopy(group), "params": {name: everyone[name] for name in group["params"]}}
        for group in further
    ]


def every_parameter(models: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    """Each parameter under each of its names, ``"model.name"``; of FSDP the shards."""
    for model_name, model in models.items():
        for part in model.modules():
            if is_fsdp_module(part):
                # After a forward without backward its parameters are the gathered ones, which
                # no optimizer knows.
                part.reshard()
        for name, parameter in model.named_parameters(remove_duplicate=False):
            yield f"{model_name}.{clean_name(name)}", parameter


def _names_by_index(optimizer: Optimizer, names: Mapping[int, str]) -> dict[int, str]:
    return dict(enumerate(_parameters_by_name(optimizer, names)))


def _parameters_by_name(optimizer: Optimizer, names: Mapping[int, str]) -> dict[str, Tensor]:
    """The optimizer's parameters, in the order of its indices."""
    return {
        # A parameter outside every model has its place in the optimizer as its name.
        names.get(id(parameter), f"group{number}.{position}"): parameter
        for number, group in enumerate(optimizer.param_groups)
        for position, parameter in enumerate(group["params"])
    }


def _fits(value: Any, target: Any) -> bool:
    if isinstance(value, Tensor) != isinstance(target, Tensor):
        return False
    return not isinstance(value, Tensor) or value.shape == target.shape


def _fits_parameter(value: Any, parameter: Tensor) -> bool:
    """State has its parameter's shape, or is a number that belongs to it (a step count)."""
    if not isinstance(value, Tensor) or value.ndim != parameter.ndim:
        return True
    # Adafactor keeps one number per row and one per column.
    return all(n in (1, wanted) for n, wanted in zip(value.shape, parameter.shape, strict=True))


def _described(value: Any) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def laid_out_like(value: Any, target: Any, *, copies: bool = True) -> Any:
    """A copy of ``value``, sharded like ``target`` if that is sharded and of the same shape.

    A copy, because modules and optimizers keep what they are given and change it in place; where
    nobody else has the value, it would be a second shard in memory for nothing.
    """
    if not isinstance(value, Tensor):
        return copy.deepcopy(value)
    if is_dtensor(target):
        if not is_dtensor(value) and value.shape == target.shape:
            from torch.distributed.tensor import distribute_tensor

            return distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
    elif is_dtensor(value):
        return value.full_tensor()
    return value.clone() if copies else value
