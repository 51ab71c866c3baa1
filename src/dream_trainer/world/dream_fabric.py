"""Fabric with its silent faults fixed, under the same method names."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import (
    DDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from torch import Tensor, nn
from torch.optim import Optimizer

from dream_trainer.storage import atomic_file
from dream_trainer.world.component_state import unsharded_norm
from dream_trainer.world.gloo_threads import let_threads_finish_at_exit
from dream_trainer.world.gradient_sync import no_gradient_sync
from dream_trainer.world.restarts import fresh_store
from dream_trainer.world.wrapped_module import improved

F = TypeVar("F", bound=Callable[..., Any])


def _as_in_fabric(method: F) -> F:
    """Let ``inspect.signature`` show the parameters of the method that this one overrides."""
    method.__wrapped__ = getattr(Fabric, method.__name__)  # type: ignore[attr-defined]
    return method


class DreamFabric(Fabric):
    """A drop-in for `Fabric`: same constructor, same methods.

    ``save`` leaves either the whole new checkpoint or the old one. ``no_backward_sync`` leaves
    gradient synchronisation as it found it. ``clip_gradients`` returns a plain tensor under
    every strategy. ``load`` calls ``load_state_dict`` of stateful objects under every strategy.
    ``launch`` also works in workers that torchrun has started again.
    Methods of a module that is set up run in the precision, and through the strategy, as its
    ``forward`` does; nothing need be marked.
    """

    @_as_in_fabric
    def launch(self, *args: Any, **kwargs: Any) -> Any:
        """Launch like Fabric; workers that torchrun started again find each other."""
        with fresh_store():
            result = super().launch(*args, **kwargs)
        if self.world_size > 1:
            let_threads_finish_at_exit()
        return result

    @_as_in_fabric
    def setup(self, module: nn.Module, *optimizers: Optimizer, **kwargs: Any) -> Any:
        """Set up like Fabric; every method of the module runs like ``forward``."""
        made = super().setup(module, *optimizers, **kwargs)
        improved(made[0] if isinstance(made, tuple) else made)
        return made

    @_as_in_fabric
    def setup_module(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Set up like Fabric; every method of the module runs like ``forward``."""
        return improved(super().setup_module(module, *args, **kwargs))

    @_as_in_fabric
    def save(
        self,
        path: str | Path,
        state: dict[str, nn.Module | Optimizer | Any],
        filter: dict[str, Callable[[str, Any], bool]] | None = None,
    ) -> None:
        """Save like Fabric, but a crash never leaves half a file in place of the old one."""
        # The other strategies write directories; MeshStrategy commits its own.
        writes_one_file = isinstance(self.strategy, (SingleDeviceStrategy, DDPStrategy))
        if not (writes_one_file and self.is_global_zero):
            super().save(path, state, filter=filter)
        else:
            with atomic_file(Path(path)) as beside:
                super().save(beside, state, filter=filter)
        # A rank that runs ahead must find the file under its final name.
        self.barrier()

    @_as_in_fabric
    def load(
        self,
        path: str | Path,
        state: dict[str, nn.Module | Optimizer | Any] | None = None,
        strict: bool = True,
        *,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Load like Fabric; stateful objects are restored in place under every strategy."""
        if state is None:
            return super().load(path, state, strict, weights_only=weights_only)
        objects: dict[str, Any] = dict(state)
        remainder = super().load(path, state, strict, weights_only=weights_only)
        for key, value in objects.items():
            # Fabric's sharded strategies put the raw state in place of the object.
            if state[key] is not value and hasattr(value, "load_state_dict"):
                value.load_state_dict(state[key])
                state[key] = value
        return remainder

    @_as_in_fabric
    def no_backward_sync(self, module: Any, enabled: bool = True) -> AbstractContextManager[None]:
        """Skip gradient synchronisation inside; afterwards it is on again."""
        if not isinstance(self.strategy, ModelParallelStrategy):
            return super().no_backward_sync(module, enabled)
        return no_gradient_sync([module]) if enabled else nullcontext()

    @_as_in_fabric
    def clip_gradients(self, *args: Any, **kwargs: Any) -> Tensor | None:
        """Clip like Fabric; the norm comes back as a plain tensor, never sharded."""
        norm = super().clip_gradients(*args, **kwargs)
        return unsharded_norm(norm) if isinstance(norm, torch.Tensor) else norm
