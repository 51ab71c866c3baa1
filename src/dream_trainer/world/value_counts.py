"""Histograms of tensors whose parts lie on several ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dream_trainer.world.sharded import is_dtensor

if TYPE_CHECKING:
    from dream_trainer.world.dream_world import DreamWorld

#: Sums that stand beside the counts of a tensor: of values, of squares, finite ones, others.
_NUM_SUMS = 4


@dataclass(frozen=True)
class ValueCounts:
    """How often values occur in a tensor, over all ranks, by bins of equal width."""

    edges: tuple[float, ...]
    """Of the bins, ascending; the last value belongs to the last bin."""
    counts: tuple[int, ...]
    """Finite values in each bin."""
    low: float
    """The smallest."""
    high: float
    """The largest."""
    total: float
    """Their sum."""
    total_squares: float
    """The sum of their squares."""
    num_nonfinite: int
    """Values that are NaN or infinite."""

    @property
    def num(self) -> int:
        """Finite values."""
        return sum(self.counts)


def count_values(
    tensors: Mapping[str, Tensor | None],
    bins: int,
    world: DreamWorld,
    *,
    differ: bool = False,
) -> dict[str, ValueCounts]:
    """Count the values of tensors over all ranks. Two collectives, and host synchronisations.

    Every rank counts its own part and the parts are added up. Where several ranks hold the same
    part, all of a replicated gradient for example, each value is counted as often everywhere, and
    the sums are divided by that.

    Args:
        tensors: name -> tensor, plain or sharded; None where this rank has nothing. The same
            names in the same order on every rank.
        bins: number of bins between the smallest and the largest value.
        world: the ranks.
        differ: whether plain tensors hold other values on every rank, samples for example; not
            on those that share samples.

    Returns:
        Those that have a finite value.
    """
    if not tensors:
        return {}
    parts = {name: _own_part(tensor) for name, tensor in tensors.items()}
    device = world.device
    dtype = torch.float32 if device.type == "mps" else torch.float64
    ranges = torch.tensor([_range(part) for part in parts.values()], dtype=dtype, device=device)
    ranges = world.all_reduce(ranges, op="max")
    lows, highs = (-ranges[:, 0]).tolist(), ranges[:, 1].tolist()
    edges = [_edges(low, high, bins) for low, high in zip(lows, highs, strict=True)]
    sums = torch.zeros(len(parts), bins + _NUM_SUMS, dtype=dtype, device=device)
    for row, part, (first, last) in zip(sums, parts.values(), edges, strict=True):
        if part is not None:
            _count_into(row, part, first, last, bins)
    sums = world.all_reduce(sums, op="sum")
    found = {}
    rows = zip(parts, sums.tolist(), lows, highs, edges, strict=True)
    for name, row, low, high, (first, last) in rows:
        counts, (total, squares, finite, others) = row[:bins], row[bins:]
        if not finite:
            continue
        tensor = tensors[name]
        if differ:
            copies = float(world.tp_size)
        else:
            copies = max(1.0, (finite + others) / tensor.numel()) if tensor is not None else 1.0
        found[name] = ValueCounts(
            edges=tuple(first + (last - first) * i / bins for i in range(bins + 1)),
            counts=tuple(round(count / copies) for count in counts),
            low=low,
            high=high,
            total=total / copies,
            total_squares=squares / copies,
            num_nonfinite=round(others / copies),
        )
    return found


def _own_part(tensor: Tensor | None) -> Tensor | None:
    """What of a tensor lies on this rank, flat; None if that is nothing."""
    if tensor is None:
        return None
    tensor = tensor.detach()
    if is_dtensor(tensor):
        if any(placement.is_partial() for placement in tensor.placements):
            from torch.distributed.tensor import Replicate

            whole = [Replicate() if one.is_partial() else one for one in tensor.placements]
            tensor = tensor.redistribute(placements=whole)
        tensor = tensor.to_local()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    part = tensor.reshape(-1)
    if part.dtype not in (torch.float32, torch.float64):
        # Whole numbers up to 2**24 are exact in float32, and MPS has nothing longer.
        exact = not part.is_floating_point() and part.device.type != "mps"
        part = part.to(torch.float64 if exact else torch.float32)
    return part if part.numel() else None


def _range(part: Tensor | None) -> tuple[float, float]:
    """Minus the smallest, and the largest finite value, so that both are maxima over ranks."""
    if part is None:
        return -math.inf, -math.inf
    finite = part[torch.isfinite(part)]
    if not finite.numel():
        return -math.inf, -math.inf
    low, high = torch.aminmax(finite)
    return -low.item(), high.item()


def _edges(low: float, high: float, bins: int) -> tuple[float, float]:
    return (low, high) if low < high else (low - 0.5, low + 0.5)


def _count_into(row: Tensor, part: Tensor, first: float, last: float, bins: int) -> None:
    finite = part[torch.isfinite(part)]
    # Not histc, which has no deterministic form on an accelerator.
    indices = ((finite - first) * (bins / (last - first))).long().clamp_(0, bins - 1)
    row[:bins] = torch.bincount(indices, minlength=bins).to(row)
    longer = finite.to(row.dtype)
    sums = (longer.sum(), longer.square().sum(), finite.numel(), part.numel() - finite.numel())
    row[bins:] = torch.tensor([float(one) for one in sums]).to(row)
