"""What is in a checkpoint: names, shapes, types and bytes, without reading the tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dream_trainer.storage import Tree, read_outlines

_MOST_TEXT = 40


@dataclass(frozen=True)
class Part:
    """A tensor, a plain value, or what lies below a name."""

    name: str
    num_tensors: int = 0
    num_elements: int = 0
    num_bytes: int = 0
    """Of tensors; plain values take next to nothing."""
    dtypes: Sequence[str] = ()
    shape: Sequence[int] | None = None
    """Of one tensor; None for everything else."""
    text: str = ""
    """A plain value, or the beginning of it."""
    parts: Sequence[Part] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain data, with names that stay."""
        about: dict[str, Any] = {"name": self.name}
        if self.shape is not None:
            return about | {
                "dtype": self.dtypes[0],
                "shape": list(self.shape),
                "bytes": self.num_bytes,
            }
        if not self.parts:
            return about | {"value": self.text}
        return about | {
            "tensors": self.num_tensors,
            "elements": self.num_elements,
            "bytes": self.num_bytes,
            "dtypes": list(self.dtypes),
            "parts": [one.as_dict() for one in self.parts],
        }


def contents(checkpoint: Path) -> Part:
    """Everything in a checkpoint as one tree; what is of one rank is below ``rank 0`` and so on.

    Raises:
        CheckpointError: its index cannot be read.
    """
    outlines = read_outlines(checkpoint)
    shared = _part("", outlines.pop(None))
    ranks = [_part(f"rank {rank}", tree) for rank, tree in outlines.items()]
    return _node("all", [*shared.parts, *ranks])


def _part(name: str, tree: Tree) -> Part:
    if isinstance(tree, Tensor):
        return Part(
            name,
            num_tensors=1,
            num_elements=tree.numel(),
            num_bytes=tree.numel() * tree.element_size(),
            dtypes=(str(tree.dtype).removeprefix("torch."),),
            shape=tuple(tree.shape),
        )
    if isinstance(tree, Mapping) and tree:
        return _node(name, [_part(str(key), entry) for key, entry in tree.items()])
    is_list = isinstance(tree, (list, tuple))
    if is_list and any(isinstance(entry, (Tensor, Mapping, list, tuple)) for entry in tree):
        return _node(name, [_part(str(index), entry) for index, entry in enumerate(tree)])
    return Part(name, text=plain_text(tree))


def _node(name: str, parts: Sequence[Part]) -> Part:
    return Part(
        name,
        num_tensors=sum(one.num_tensors for one in parts),
        num_elements=sum(one.num_elements for one in parts),
        num_bytes=sum(one.num_bytes for one in parts),
        dtypes=tuple(dict.fromkeys(dtype for one in parts for dtype in one.dtypes)),
        parts=parts,
    )


def plain_text(value: Any) -> str:
    """A plain value in a few words."""
    text = repr(value)
    if len(text) <= _MOST_TEXT:
        return text
    if isinstance(value, (list, tuple, set)):
        return f"{type(value).__name__} of {len(value):,}"
    return f"{text[: _MOST_TEXT - 3]}..."
