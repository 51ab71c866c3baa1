"""Fabric's mixed precision for FSDP2, whose own policy casts parameters, inputs and reductions."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.precision import MixedPrecision, Precision
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer


class ShardedPrecision(Precision):
    """Nothing is cast but outputs, to the default type, as autocast's are."""

    def convert_output(self, data: Any) -> Any:
        """Floating-point tensors in the default type."""
        # In FSDP2's policy it would hold for every block, between layers that compute in half.
        full = torch.get_default_dtype()
        return apply_to_collection(
            data, Tensor, lambda t: t.to(full) if t.is_floating_point() else t
        )


class ShardedMixedPrecision(ShardedPrecision, MixedPrecision):
    """``"bf16-mixed"`` and ``"16-mixed"``: autocast around FSDP2's policy, losses scaled alike.

    Without autocast a buffer in float32, or an operation that one device runs in float32, would
    meet parameters in half and fail, where one device does not.

    Args:
        mixed: Fabric's plugin; its scaler's settings are taken over.
    """

    def __init__(self, mixed: MixedPrecision) -> None:
        scaler = mixed.scaler and MeshGradScaler.like(mixed.scaler, mixed.device)
        super().__init__(mixed.precision, mixed.device, scaler)  # type: ignore[arg-type]

    def convert_input(self, data: Any) -> Any:
        """Inputs as they are: FSDP2's hooks cast them."""
        return data

    def unscale_gradients(self, optimizer: Optimizer) -> None:
        """Divide gradients by the loss scale, also for optimizers that could do it themselves."""
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)


class MeshGradScaler(GradScaler):
    """A ``GradScaler`` whose ranks skip the same steps, with gradients on any part of a mesh."""

    @classmethod
    def like(cls, scaler: GradScaler, device: str) -> MeshGradScaler:
        """One with the settings of another, which has not scaled anything yet."""
        return cls(
            device,
            init_scale=scaler.get_scale(),
            growth_factor=scaler.get_growth_factor(),
            backoff_factor=scaler.get_backoff_factor(),
            growth_interval=scaler.get_growth_interval(),
            enabled=scaler.is_enabled(),
        )

    def _unscale_grads_(
        self, optimizer: Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        # torch's own takes no list of gradients from several meshes.
        by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if parameter.grad.dtype == torch.float16 and not allow_fp16:
                    raise ValueError("gradients in float16 cannot be unscaled without overflow")
                grad = parameter.grad
                local = grad.to_local() if isinstance(grad, DTensor) else grad
                by_kind.setdefault((local.device, local.dtype), []).append(local)
        overflows = found_inf.clone()
        for (device, _), grads in by_kind.items():
            found = torch.zeros_like(found_inf, device=device)
            torch._amp_foreach_non_finite_check_and_unscale_(grads, found, inv_scale.to(device))
            overflows += found.to(overflows.device)
        if dist.is_initialized():
            # A rank that saw nothing would step where the others do not.
            dist.all_reduce(overflows, dist.ReduceOp.MAX)
        return {overflows.device: overflows}
