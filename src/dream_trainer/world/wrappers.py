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
    # Without this module Fabric has not wrapped anything.
    if (fabric := sys.modules.get("lightning.fabric.wrappers")) is not None:
        if isinstance(wrapped, fabric._FabricModule):
            return wrapped.module
        if isinstance(wrapped, fabric._FabricOptimizer):
            return wrapped.optimizer
    if isinstance(wrapped, nn.parallel.DistributedDataParallel):
        return wrapped.module
    return wrapped
