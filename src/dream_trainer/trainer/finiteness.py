"""Whether a state may be saved as good."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.optim import Optimizer

from dream_trainer.trainer.components import Components
from dream_trainer.world.component_state import parameter_names, parameters_of
from dream_trainer.world.sharded import is_dtensor

Named = list[tuple[str, Tensor]]


def first_nonfinite_on_rank(components: Components) -> str | None:
    """Name of the first parameter, or optimizer state, with a NaN or infinity on this rank.

    Buffers are not looked at: masks hold infinities on purpose. One host synchronisation, or two if
    there is something to find.
    """
    named = [(name, tensor) for name, tensor in _tensors(components) if tensor.numel()]
    # On the CPU the largest value takes sixteen times as long as a norm. A norm that is finite has
    # finite values; one that is not may have overflowed.
    suspects = _with_infinite_norm(named, 2.0)
    found = _with_infinite_norm(suspects, float("inf"))
    return found[0][0] if found else None


def first_nonfinite_gradient(components: Components, optimizer: Optimizer) -> str | None:
    """Name of the first parameter of an optimizer whose gradient is not finite on this rank.

    A host synchronisation, or two if there is something to find.
    """
    names = parameter_names(components.models)
    named = [
        (names.get(id(parameter), "a parameter"), _local(parameter.grad))
        for parameter in parameters_of([optimizer])
        if parameter.grad is not None
    ]
    suspects = _with_infinite_norm([one for one in named if one[1].numel()], 2.0)
    found = _with_infinite_norm(suspects, float("inf"))
    return found[0][0] if found else None


def _with_infinite_norm(named: Named, order: float) -> Named:
    if not named:
        return []
    norms = torch._foreach_norm([tensor for _, tensor in named], ord=order)
    device = named[0][1].device
    flags = torch.stack([norm.to(device, torch.float32) for norm in norms]).isfinite().tolist()
    return [one for one, is_finite in zip(named, flags, strict=True) if not is_finite]


def _tensors(components: Components) -> Iterator[tuple[str, Tensor]]:
    names = parameter_names(components.models)
    for model_name, model in components.models.items():
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point():
                yield f"models.{model_name}.{name}", _local(parameter)
    for optimizer_name, optimizer in components.optimizers.items():
        for owner, state in optimizer.state.items():
            for key, value in state.items():
                if isinstance(value, Tensor) and value.is_floating_point():
                    place = names.get(id(owner), "parameter")
                    yield f"optimizers.{optimizer_name}.{place}.{key}", _local(value)


def _local(tensor: Tensor) -> Tensor:
    return (tensor.to_local() if is_dtensor(tensor) else tensor).detach()
