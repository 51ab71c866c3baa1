"""Gradients inside an accumulation window: each rank's own, before they are added up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from dream_trainer.world.component_state import clean_name, parameter_names
from dream_trainer.world.sharded import is_dtensor, is_fsdp_module

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


def window_gradients(models: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """What this rank alone has gathered so far, by parameter name. Between batches only."""
    names = parameter_names(models)
    gathered = {
        name: parameter.grad
        for name, parameter in _parameters(models)
        if parameter.grad is not None and not is_dtensor(parameter.grad)
    }
    for part in _sharded_parts(models):
        for own in _fsdp_parameters(part):
            if (gradient := _unsharded_gradient(own)) is not None:
                gathered[names[id(own.sharded_param)]] = _local(gradient)
    return gathered


def load_window_gradients(models: Mapping[str, nn.Module], state: Mapping[str, Tensor]) -> None:
    """The inverse of `window_gradients`, on the same rank of the same layout. A collective."""
    names = parameter_names(models)
    for name, parameter in _parameters(models):
        if name in state and not is_dtensor(parameter):
            parameter.grad = state[name].to(parameter.device, copy=True)
    for part in _sharded_parts(models):
        # Before the first forward there is nothing yet to hang a gradient on. Every part, whether
        # this rank has gradients for it or not: a collective.
        part.unshard()
        for own in _fsdp_parameters(part):
            if (value := state.get(names[id(own.sharded_param)])) is not None:
                _set_unsharded_gradient(own, value)
        part.reshard()


def _parameters(models: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    for model_name, model in models.items():
        for name, parameter in model.named_parameters():
            yield f"{model_name}.{clean_name(name)}", parameter


def _sharded_parts(models: Mapping[str, nn.Module]) -> Iterator[FSDPModule]:
    for model in models.values():
        yield from (part for part in model.modules() if is_fsdp_module(part))


def _fsdp_parameters(part: FSDPModule) -> list[Any]:
    # torch has no public way to them. The groups are one or none in older releases.
    state = part._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:
        groups = [state._fsdp_param_group] if state._fsdp_param_group is not None else []
    return [own for group in groups for own in group.fsdp_params]


def _unsharded_gradient(own: Any) -> Tensor | None:
    if own.unsharded_accumulated_grad is not None:
        return own.unsharded_accumulated_grad  # type: ignore[no-any-return]
    unsharded = getattr(own, "_unsharded_param", None)  # absent before the first forward
    return None if unsharded is None else unsharded.grad


def _set_unsharded_gradient(own: Any, value: Tensor) -> None:
    parameter = own._unsharded_param
    gradient = value.to(_local(parameter).device, copy=True)
    if is_dtensor(parameter):
        from torch.distributed.tensor import DTensor

        gradient = DTensor.from_local(
            gradient,
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )
    if gradient.dtype == parameter.dtype:
        parameter.grad = gradient
    else:
        # Kept in the type that gradients are reduced in.
        own.unsharded_accumulated_grad = gradient


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if is_dtensor(tensor) else tensor
