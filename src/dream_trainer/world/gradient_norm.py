"""Norm and scale of gradients that live on different parts of a mesh."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils import get_total_norm

from dream_trainer.world.sharded import is_dtensor


def clip_to_norm(
    gradients: Sequence[Tensor],
    max_norm: float | None,
    *,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> Tensor:
    """Scale gradients down to a norm, over all ranks that hold a part of them.

    torch's own function takes no list of gradients from several meshes, and with tensor parallel
    there are two: layers that are split live on ``dp_shard`` x ``tp``, the others on ``dp_shard``.
    Costs a small all-reduce for each dimension that something is sharded over.

    Args:
        gradients: plain or sharded, the same list on every rank.
        max_norm: the norm they have afterwards at most; None changes nothing.
        norm_type: which norm, ``inf`` for the largest element.
        error_if_nonfinite: raise at NaN or infinity; costs a host sync.

    Returns:
        The norm before: a plain tensor without dimensions, the same on every rank.
    """
    norm = total_norm(gradients, norm_type)
    if error_if_nonfinite and not torch.isfinite(norm):
        raise RuntimeError(f"the norm of the gradients is non-finite: {float(norm)}")
    if max_norm is not None:
        scale(gradients, torch.clamp(max_norm / (norm + 1e-6), max=1.0))
    return norm


def total_norm(gradients: Iterable[Tensor], norm_type: float = 2.0) -> Tensor:
    """The norm of all gradients as one vector, over all ranks that hold a part of them."""
    by_groups: dict[tuple[dist.ProcessGroup, ...], list[Tensor]] = {}
    device = None
    for gradient in gradients:
        groups, local = _shards(gradient)
        by_groups.setdefault(groups, []).append(local)
        if device is None and is_dtensor(gradient):
            # Gradients of offloaded parameters are in CPU memory; the ranks talk elsewhere.
            device = torch.device(gradient.device_mesh.device_type)
    if not by_groups:
        return torch.tensor(0.0)
    if list(by_groups) == [()]:
        return get_total_norm(by_groups[()], norm_type)
    largest = math.isinf(norm_type)
    totals = {
        groups: _power(get_total_norm(_not_empty(local), norm_type).to(device), norm_type)
        for groups, local in by_groups.items()
    }
    # From the innermost dimension outwards: what is reduced over one joins those that need no more.
    while deepest := max(totals, key=len):
        total = totals.pop(deepest).clone()
        dist.all_reduce(total, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM, deepest[-1])
        outer = deepest[:-1]
        if outer in totals:
            total = torch.maximum(total, totals[outer]) if largest else total + totals[outer]
        totals[outer] = total
    return totals[()] if largest else totals[()] ** (1.0 / norm_type)


def scale(gradients: Iterable[Tensor], factor: Tensor | float) -> None:
    """Multiply gradients in place, plain and sharded ones alike. No collective."""
    by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for gradient in gradients:
        local = gradient.to_local() if is_dtensor(gradient) else gradient
        by_kind.setdefault((local.device, local.dtype), []).append(local)
    for (device, dtype), shards in by_kind.items():
        if isinstance(factor, Tensor):
            torch._foreach_mul_(shards, factor.to(device, dtype))
        else:
            torch._foreach_mul_(shards, factor)


def _shards(gradient: Tensor) -> tuple[tuple[dist.ProcessGroup, ...], Tensor]:
    """The groups that a gradient is sharded over, outermost first, and the own part of it."""
    if not is_dtensor(gradient):
        return (), gradient
    if any(placement.is_partial() for placement in gradient.placements):
        from torch.distributed.tensor import Replicate

        whole = [Replicate() if p.is_partial() else p for p in gradient.placements]
        gradient = gradient.redistribute(placements=whole)
    mesh = gradient.device_mesh
    groups = tuple(
        mesh.get_group(dimension)
        for dimension, placement in enumerate(gradient.placements)
        if not placement.is_replicate() and mesh.size(dimension) > 1
    )
    return groups, gradient.to_local()


def _not_empty(shards: list[Tensor]) -> list[Tensor]:
    """Without the shards of rows that this rank has none of; the infinity norm has no such."""
    return [shard for shard in shards if shard.numel()] or [shards[0].new_zeros(1)]


def _power(norm: Tensor, norm_type: float) -> Tensor:
    if math.isinf(norm_type):
        return norm
    # The square of 256 is too large for float16.
    norm = norm.float() if norm.dtype in (torch.float16, torch.bfloat16) else norm
    return norm**norm_type
