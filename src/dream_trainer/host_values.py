"""Numbers from the device: many in one transfer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

Value = Tensor | float | int


def to_host(values: Iterable[Value]) -> list[float]:
    """Numbers, and tensors of one element, as floats; in one transfer. A host synchronisation."""
    values = list(values)
    brought = iter(moved([value for value in values if isinstance(value, Tensor)]))
    return [next(brought) if isinstance(value, Tensor) else float(value) for value in values]


def moved(tensors: Sequence[Tensor]) -> list[float]:
    """Tensors of one element as floats; in one transfer. A host synchronisation."""
    if not tensors:
        return []
    found: list[float] = stacked(tensors).tolist()
    return found


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of one element as one of float64, on their device."""
    # A user's own value, or one from a checkpoint, may be on the CPU beside an accelerator's.
    device = next((t.device for t in tensors if t.device.type != "cpu"), tensors[0].device)
    dtype = tensors[0].dtype
    if any(t.dtype != dtype or t.device != device for t in tensors):
        tensors = [tensor.double().to(device) for tensor in tensors]
    return torch.stack([t.reshape(()) if t.ndim else t for t in tensors]).double()
