"""Who holds what: tensors by shape and division, and the bytes of any rank's part."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

Split = tuple[int, str]


@dataclass(frozen=True)
class TensorKind:
    """Tensors of one shape that are divided alike."""

    shape: tuple[int, ...]
    """Of the whole tensor."""
    itemsize: int
    """Bytes of an element."""
    splits: tuple[Split, ...] = ()
    """``(dimension of the tensor, dimension of the mesh)``, in the order of the mesh; a dimension
    of the mesh that is not named holds copies."""

    @classmethod
    def of(cls, tensor: Tensor) -> TensorKind:
        """The kind of a tensor, divided or not."""
        splits: tuple[Split, ...] = ()
        if isinstance(tensor, DTensor):
            names = tensor.device_mesh.mesh_dim_names or ()
            # By attribute: where FSDP cuts what tensor parallel cut before, it is no plain Shard.
            splits = tuple(
                (dim, name)
                for placement, name in zip(tensor.placements, names, strict=True)
                if (dim := getattr(placement, "dim", None)) is not None
            )
        return cls(tuple(tensor.shape), tensor.element_size(), splits)

    @property
    def whole(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * self.itemsize

    def local(self, sizes: Mapping[str, int], place: Mapping[str, int]) -> int:
        """Bytes of the part at a place in the mesh.

        torch cuts a dimension into chunks of equal size, as ``torch.chunk`` does: the last ones are
        smaller, or empty. What tensor parallel has cut FSDP cuts again, so the inner dimension of
        the mesh comes first.

        Args:
            sizes: of the mesh.
            place: index in each of its dimensions.
        """
        shape = list(self.shape)
        for dim, name in reversed(self.splits):
            chunk = -(-shape[dim] // sizes[name])
            shape[dim] = min(max(shape[dim] - chunk * place[name], 0), chunk)
        return math.prod(shape) * self.itemsize

    def num_parts(self, sizes: Mapping[str, int]) -> int:
        """Pieces that the tensor is cut into, empty ones among them."""
        return math.prod(sizes[name] for _, name in self.splits)

    def num_without(self, sizes: Mapping[str, int], dimension: str) -> int:
        """Indices of a dimension of the mesh that get nothing of the tensor."""
        for dim, name in self.splits:
            if name == dimension and self.shape[dim]:
                size = sizes[name]
                return size - -(-self.shape[dim] // -(-self.shape[dim] // size))
        return 0


Counts = Mapping[TensorKind, int]


def count_kinds(tensors: Iterable[Tensor]) -> dict[TensorKind, int]:
    """How many tensors of each kind there are; one that comes twice counts once."""
    counts: dict[TensorKind, int] = {}
    for tensor in {id(tensor): tensor for tensor in tensors}.values():
        kind = TensorKind.of(tensor)
        counts[kind] = counts.get(kind, 0) + 1
    return counts


def add_counts(several: Iterable[Counts]) -> dict[TensorKind, int]:
    """Several counts as one."""
    counts: dict[TensorKind, int] = {}
    for one in several:
        for kind, number in one.items():
            counts[kind] = counts.get(kind, 0) + number
    return counts


def whole_bytes(counts: Counts) -> int:
    """Bytes of all tensors, undivided and each once."""
    return sum(kind.whole * number for kind, number in counts.items())


def local_bytes(counts: Counts, sizes: Mapping[str, int], place: Mapping[str, int]) -> int:
    """Bytes that the rank at a place in the mesh holds of them."""
    return sum(kind.local(sizes, place) * number for kind, number in counts.items())


def state_counts(optimizer: Optimizer) -> dict[TensorKind, int] | None:
    """The state that an optimizer keeps after a step, found by one; None if it makes none here.

    One parameter of each shape, type and group takes the step, with a gradient that holds nothing;
    the others have state like it. An optimizer that reads values fails on the meta device, but
    torch's own ones have made their state by then.
    """
    counts: dict[TensorKind, int] = {}
    groups = optimizer.param_groups
    try:
        for group in groups:
            alike: dict[tuple[TensorKind, torch.dtype], list[Tensor]] = {}
            for parameter in group["params"]:
                parameter.grad = None
                if parameter.requires_grad:
                    key = TensorKind.of(parameter), parameter.dtype
                    alike.setdefault(key, []).append(parameter)
            chosen = [parameters[0] for parameters in alike.values()]
            # By itself, so that a failure in one group keeps no other from making its state.
            optimizer.param_groups = [group]
            if chosen and not _make_state(optimizer, group, chosen):
                return None
            for parameters in alike.values():
                for value in _tensors(optimizer.state.get(parameters[0], {}).values()):
                    kind = TensorKind.of(value)
                    counts[kind] = counts.get(kind, 0) + len(parameters)
    finally:
        optimizer.param_groups = groups
    return counts


def gathered_parts(model: nn.Module) -> Iterator[tuple[str, list[nn.Parameter]]]:
    """What FSDP gathers at once: name of each part and its own parameters."""
    seen: set[int] = set()
    parts = [(name, part) for name, part in model.named_modules() if isinstance(part, FSDPModule)]
    # Inner parts come after outer ones, and take their parameters for themselves.
    for name, part in reversed(parts):
        own = [p for p in part.parameters() if id(p) not in seen]
        seen.update(map(id, own))
        yield name, own


def _make_state(optimizer: Optimizer, group: dict[str, object], chosen: Sequence[Tensor]) -> bool:
    # Fused kernels are refused on the meta device; the others keep the same state.
    plain = {name: None for name in ("fused", "foreach") if group.get(name)}
    kept = {name: group[name] for name in plain}
    group.update(plain)
    for parameter in chosen:
        parameter.grad = torch.empty_like(parameter)
    try:
        optimizer.step()
    except Exception:  # noqa: BLE001 - whatever an optimizer does without values
        return all(len(optimizer.state.get(parameter, {})) for parameter in chosen)
    finally:
        group.update(kept)
        for parameter in chosen:
            parameter.grad = None
    return True


def _tensors(values: Iterable[object]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
