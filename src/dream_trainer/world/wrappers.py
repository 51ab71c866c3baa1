"""What Fabric and torch put around a user's object, known without loading Fabric."""

from __future__ import annotations

import sys
from typing import Any, overload

from torch import nn
from torch.optim import Optimizer


@overload
def unwrap(wrapped: nn.Module) -> nn.Module: ...
@overload
def unwrap(wrapped: Optimizer) -> Optimizer: ...
def unwrap(wrapped: Any) -> Any:
    """The user's own object behind what Fabric wrapped; anything else as it is."""
    if (fabric := _fabric_wrappers()) is not None:
        if isinstance(wrapped, fabric._FabricModule):
            return wrapped.module
        if isinstance(wrapped, fabric._FabricOptimizer):
            return wrapped.optimizer
    if isinstance(wrapped, nn.parallel.DistributedDataParallel):
        return wrapped.module
    return wrapped


def forward_module(wrapped: Any) -> nn.Module:
    """The strategy's module, DDP for one, behind what Fabric wrapped; anything else as it is."""
    fabric = _fabric_wrappers()
    is_wrapped = fabric is not None and isinstance(wrapped, fabric._FabricModule)
    module: nn.Module = wrapped._forward_module if is_wrapped else wrapped
    return module


def _fabric_wrappers() -> Any:
    """The module with Fabric's wrappers. If it is not loaded, Fabric has not wrapped anything."""
    return sys.modules.get("lightning.fabric.wrappers")
