"""A module on its device, sharded or replicated, and wrapped: what ``world.setup`` does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.fabric.wrappers import _FabricModule
from torch import Tensor, nn
from torch.optim import Optimizer

from dream_trainer.world.gradient_sync import fix_bucket_order
from dream_trainer.world.materialize import initialize as initialize_modules
from dream_trainer.world.materialize import layers_on_meta, materialize
from dream_trainer.world.mesh_strategy import MeshStrategy, Parallelize
from dream_trainer.world.wrapped_module import improved, requiring_gradients


def set_up(
    fabric: Fabric,
    module: nn.Module,
    optimizers: Sequence[Optimizer],
    device: torch.device,
    parallelize: Parallelize | None,
    *,
    initialize: bool,
) -> Any:
    """See `DreamWorld.setup`."""
    strategy = fabric.strategy
    layers = layers_on_meta(module)
    if layers and isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)):
        materialize(module, device, device)
        if initialize:
            initialize_modules(strategy, {"": module}, layers)
    trains = any(parameter.requires_grad for parameter in module.parameters())
    if isinstance(strategy, DDPStrategy) and not trains and not optimizers:
        return improved(_set_up_frozen(fabric, module))
    if not isinstance(strategy, MeshStrategy):
        wrapped = fabric.setup(module, *optimizers)
    else:
        default = strategy.parallelize, strategy.initializes_modules
        strategy.parallelize = parallelize or strategy.parallelize
        strategy.initializes_modules = initialize
        try:
            wrapped = fabric.setup(module, *optimizers)
        finally:
            strategy.parallelize, strategy.initializes_modules = default
    fix_bucket_order(improved(wrapped[0] if optimizers else wrapped))
    return wrapped


def _set_up_frozen(fabric: Fabric, module: nn.Module) -> _FabricModule:
    """DDP refuses a module without gradients; a frozen teacher or a loss has none."""
    strategy = fabric.strategy
    floating = [p for p in module.parameters() if p.is_floating_point()]
    if not floating:
        module = strategy.precision.convert_module(module)
        strategy.module_to_device(module)
        return _FabricModule(module, strategy, original_module=module)
    # DDP holds a buffer for what it reduces, so it gets the smallest until more is unfrozen.
    with requiring_gradients([min(floating, key=Tensor.numel)], [True]):
        return fabric.setup(module)  # type: ignore[no-any-return]


__all__ = ["set_up"]
