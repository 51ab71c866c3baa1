"""What of Fabric's way through a step can be left out, because nothing on it does anything.

Found once, when a module or a trainer is set up. A strategy or a precision plugin that overrides a
hook is asked as Fabric asks it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.precision import MixedPrecision, Precision
from lightning.fabric.strategies import Strategy
from lightning.fabric.wrappers import _FabricOptimizer
from torch import Tensor
from torch.optim import Optimizer

_FORWARD_HOOKS = ("convert_input", "forward_context", "convert_output")
_BACKWARD_HOOKS = ("pre_backward", "backward", "post_backward")


def leaves_forward_alone(strategy: Strategy) -> bool:
    """Whether a forward pass needs no conversion and no context."""
    return _is_as_in(strategy.precision, Precision, *_FORWARD_HOOKS)


def leaves_backward_alone(strategy: Strategy) -> bool:
    """Whether a backward pass is that of the loss, and nothing else."""
    return _is_as_in(strategy, Strategy, "backward") and (
        _is_as_in(strategy.precision, Precision, *_BACKWARD_HOOKS)
        or is_autocast_alone(strategy.precision)
    )


def is_autocast_alone(precision: Precision) -> bool:
    """Whether it is Fabric's ``"bf16-mixed"``, which scales no loss."""
    return type(precision) is MixedPrecision and precision.scaler is None


def backward_of(
    fabric: Fabric, backward: Callable[[Tensor], object]
) -> Callable[[Tensor, float], None]:
    """What a backward pass of a loss times a factor comes down to.

    Args:
        fabric: whose plugins take part.
        backward: ``fabric.backward``, or what is called instead of it.
    """
    is_fabrics_own = getattr(backward, "__func__", None) is Fabric.backward
    if is_fabrics_own and leaves_backward_alone(fabric.strategy):
        return _Backward()

    def through_fabric(loss: Tensor, factor: float) -> None:
        backward(loss if factor == 1.0 else loss * factor)

    return through_fabric


class _Backward:
    """The backward pass of a loss times a factor, without multiplying the loss.

    The gradient that it starts from is the factor, to the bit as after a multiplication, which
    costs an operation and its backward in every batch of an accumulation window.
    """

    def __init__(self) -> None:
        self._gradient, self._factor = torch.tensor(1.0), 1.0

    def __call__(self, loss: Tensor, factor: float) -> None:
        if factor == 1.0:
            loss.backward()
            return
        gradient = self._gradient
        if (
            factor != self._factor
            or type(gradient) is not type(loss)
            or gradient.dtype != loss.dtype
            or gradient.shape != loss.shape
            or gradient.device != loss.device
        ):
            self._gradient = gradient = torch.full_like(loss, factor, requires_grad=False)
            self._factor = factor
        loss.backward(gradient)


def optimizer_to_step(optimizer: Optimizer) -> Optimizer:
    """The one whose ``step`` is what that of a wrapped optimizer comes down to."""
    if not isinstance(optimizer, _FabricOptimizer):
        return optimizer
    strategy, precision = optimizer._strategy, optimizer._strategy.precision
    is_alone = (
        _is_as_in(strategy, Strategy, "optimizer_step")
        and (_is_as_in(precision, Precision, "optimizer_step") or is_autocast_alone(precision))
        and not any(hasattr(one, "on_after_optimizer_step") for one in optimizer._callbacks)
    )
    own: Any = optimizer.optimizer
    return own if is_alone else optimizer


def _is_as_in(plugin: object, base: type, *hooks: str) -> bool:
    return all(
        getattr(type(plugin), hook) is getattr(base, hook) and hook not in vars(plugin)
        for hook in hooks
    )
