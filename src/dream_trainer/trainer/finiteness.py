"""Whether a state may be saved as good."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dream_trainer.trainer.components import Components
from dream_trainer.world.component_state import parameter_names
from dream_trainer.world.sharded import is_dtensor


def first_nonfinite(components: Components) -> str | None:
    """Name of the first parameter, or optimizer state, with a NaN or infinity on this rank.

    Buffers are not looked at: masks hold infinities on purpose. One host synchronisation.
    """
    named = [(name, tensor) for name, tensor in _tensors(components) if tensor.numel()]
    if not named:
        return None
    # A sum of absolute values could overflow; the largest one cannot.
    largest = torch._foreach_norm([tensor for _, tensor in named], ord=float("inf"))
    is_finite = torch.stack([norm.to(named[0][1].device) for norm in largest]).isfinite()
    flags = is_finite.tolist()
    return None if all(flags) else named[flags.index(False)][0]


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
