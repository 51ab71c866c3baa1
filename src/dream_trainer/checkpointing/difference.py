"""Two checkpoints against each other: facts, configuration, and every value to the bit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dream_trainer.checkpointing.contents import plain_text
from dream_trainer.storage import Manifest, Tree, TreePath, join, read_outlines, read_tensors

#: What a clock says is never the same twice.
CLOCKS = ("trainer.progress.seconds",)
FACTS = ("step", "epoch", "world_size", "monitor", "monitored", "versions", "format_version")
_BYTES_AT_ONCE = 1 << 28
_ELEMENTS_AT_ONCE = 1 << 22

Place = tuple[int | None, TreePath]
Pair = tuple[Any, Any]


@dataclass
class PartDifference:
    """The tensors of one part: a model, an optimizer, the generators of a rank."""

    part: str
    num_tensors: int = 0
    """That are in both, with one shape."""
    num_differing: int = 0
    """Of them, those that are not equal to the bit."""
    largest: float = 0.0
    """Largest absolute difference of two elements; NaN if one of them is NaN, 0 if only bits
    without a meaning differ, the sign of a zero."""
    largest_in: str = ""
    """The tensor that it is in."""


@dataclass
class StateDifference:
    """How the states of two checkpoints differ; pairs are of the first and the second."""

    only_in_one: list[str] = field(default_factory=list)
    only_in_other: list[str] = field(default_factory=list)
    shapes: dict[str, Pair] = field(default_factory=dict)
    dtypes: dict[str, Pair] = field(default_factory=dict)
    plain: dict[str, Pair] = field(default_factory=dict)
    """Values that are no tensors, in a few words."""
    parts: list[PartDifference] = field(default_factory=list)

    @property
    def is_same(self) -> bool:
        """Whether the states are equal to the bit."""
        named = (self.only_in_one, self.only_in_other, self.shapes, self.dtypes, self.plain)
        return not any(named) and not any(one.num_differing for one in self.parts)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, with names that stay; JSON has no NaN and no infinity, so they are words."""
        plain = asdict(self)
        for part in plain["parts"]:
            if not math.isfinite(part["largest"]):
                part["largest"] = str(part["largest"])
        return plain


def compare_manifests(one: Manifest, other: Manifest) -> dict[str, Pair]:
    """Facts that differ; the time of saving and the files are none."""
    pairs = {name: (getattr(one, name), getattr(other, name)) for name in FACTS}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def compare_states(
    one: Path, other: Path, advance: Callable[[int], object] = bool
) -> StateDifference:
    """Compare all that two checkpoints hold, except what a clock says.

    Takes memory for a few hundred MB of tensors at a time, or for the largest one.

    Args:
        one: a checkpoint.
        other: another one.
        advance: called with the number of bytes that were just compared, of one checkpoint.

    Raises:
        CheckpointError: one cannot be read.
    """
    found = StateDifference()
    ours, theirs = _leaves(one), _leaves(other)
    found.only_in_one = [_name(place) for place in ours if place not in theirs]
    found.only_in_other = [_name(place) for place in theirs if place not in ours]
    comparable: dict[Place, int] = {}
    for place in (place for place in ours if place in theirs):
        pair = ours[place], theirs[place]
        if not all(isinstance(value, Tensor) for value in pair):
            if not _same_plain(*pair):
                found.plain[_name(place)] = _words(pair[0]), _words(pair[1])
            continue
        if pair[0].dtype != pair[1].dtype:
            found.dtypes[_name(place)] = _dtype(pair[0]), _dtype(pair[1])
        if pair[0].shape != pair[1].shape:
            found.shapes[_name(place)] = tuple(pair[0].shape), tuple(pair[1].shape)
        else:
            comparable[place] = pair[0].numel() * pair[0].element_size()
    found.parts = _compare_values(one, other, comparable, advance)
    return found


def _compare_values(
    one: Path, other: Path, sizes: Mapping[Place, int], advance: Callable[[int], object]
) -> list[PartDifference]:
    parts: dict[str, PartDifference] = {}
    for places in _chunks(sizes):
        ours, theirs = read_tensors(one, places), read_tensors(other, places)
        for place in places:
            part = parts.setdefault(_part(place), PartDifference(_part(place)))
            part.num_tensors += 1
            if not _same_bits(ours[place], theirs[place]):
                part.num_differing += 1
                largest = _largest(ours[place], theirs[place])
                # A NaN is larger than any number, and is found once.
                if not part.largest_in or largest > part.largest or largest != largest:
                    part.largest, part.largest_in = largest, _name(place)
            advance(sizes[place])
    return list(parts.values())


def _chunks(sizes: Mapping[Place, int]) -> Iterator[Sequence[Place]]:
    chunk: list[Place] = []
    held = 0
    for place, number in sizes.items():
        if chunk and held + number > _BYTES_AT_ONCE:
            yield chunk
            chunk, held = [], 0
        chunk.append(place)
        held += number
    if chunk:
        yield chunk


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype:
        return False
    bits = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return torch.equal(*bits)


def _largest(one: Tensor, other: Tensor) -> float:
    """Largest absolute difference; elements that are equal, or NaN in both, have none."""
    wide = torch.complex128 if one.is_complex() or other.is_complex() else torch.float64
    largest = 0.0
    flat = one.reshape(-1).split(_ELEMENTS_AT_ONCE), other.reshape(-1).split(_ELEMENTS_AT_ONCE)
    for ours, theirs in zip(*flat, strict=True):
        a, b = ours.to(wide), theirs.to(wide)
        is_alike = (a == b) | (a.isnan() & b.isnan())
        apart = (a - b).abs().masked_fill(is_alike, 0.0)
        found = float(apart.max()) if apart.numel() else 0.0
        if found != found:
            return found
        largest = max(largest, found)
    return largest


def _leaves(checkpoint: Path) -> dict[Place, Any]:
    """Meta tensors and plain values by place, without clocks."""
    found = {
        (rank, path): value
        for rank, tree in read_outlines(checkpoint).items()
        for path, value in _walk(tree, ())
    }
    return {place: value for place, value in found.items() if _name(place) not in CLOCKS}


def _walk(tree: Tree, path: TreePath) -> Iterator[tuple[TreePath, Any]]:
    if isinstance(tree, Mapping) and tree:
        for key, entry in tree.items():
            yield from _walk(entry, (*path, key))
    elif isinstance(tree, (list, tuple)) and any(
        isinstance(entry, (Tensor, Mapping, list, tuple)) for entry in tree
    ):
        for index, entry in enumerate(tree):
            yield from _walk(entry, (*path, index))
    else:
        yield path, tree


def _same_plain(one: Any, other: Any) -> bool:
    # By their text: NaN is NaN, and 1 is neither 1.0 nor True.
    return type(one) is type(other) and (one == other or repr(one) == repr(other))


def _words(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{_dtype(value)} {tuple(value.shape)}"
    return plain_text(value)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _name(place: Place) -> str:
    rank, path = place
    return join(path) if rank is None else f"rank {rank}: {join(path)}"


def _part(place: Place) -> str:
    """``models.net``, ``rank 0: rng``."""
    rank, path = place
    return _name((rank, path[:2] if rank is None else path[:1]))
