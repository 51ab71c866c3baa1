"""Values as digests: equal digests, equal bits. Looking at a value does not change it."""

from __future__ import annotations

import hashlib
import itertools
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from dream_trainer.callbacks import Callback
from dream_trainer.data.own_generators import GENERATORS, generator_state
from dream_trainer.trainer.abstract import AbstractTrainer

_SCALARS = (bool, int, float, complex, str, bytes, type(None), Enum, PurePath, torch.dtype)
_SEQUENCES = (list, tuple, deque)
# A reference back to the trainer would make everything an attribute of everything; data sets
# cache, and what matters of them is in the batches.
_NEVER_AT_HOME = (type, nn.Module, Callback, AbstractTrainer, Dataset, DataLoader, Sampler)
# Of longer containers only the length and the first items count: walking ten million numbers
# at every step would take longer than the run.
_MOST_ITEMS = 100_000
_MOST_DEPTH = 12


@dataclass(frozen=True)
class Leaf:
    """A value as it is compared, and as it is shown."""

    digest: str
    text: str


class OpaqueError(TypeError):
    """A value that is neither plain data, nor a tensor, nor a container of these."""


def leaf(value: Any, home: str | None = None) -> Leaf | None:
    """One value, whatever is inside, as one leaf.

    Args:
        value: anything.
        home: a top-level package. Objects of its classes count by their attributes.

    Returns:
        None if the value is opaque: an open file, a thread, an object of a foreign class.
    """
    hasher = hashlib.sha256()
    try:
        _feed(hasher, value, home, 0)
    except OpaqueError:
        return None
    return Leaf(hasher.hexdigest(), describe(value))


def leaves(tree: Any, path: str = "", depth: int = 0) -> dict[str, Leaf]:
    """The leaves of nested containers by dotted path; opaque ones are left out.

    An empty container is a leaf. Objects of any class are walked through by their attributes.
    """
    children = _children(tree)
    if children and depth <= _MOST_DEPTH:
        return {
            place: one
            for key, value in children.items()
            for place, one in leaves(value, f"{path}.{key}".lstrip("."), depth + 1).items()
        }
    found = leaf(tree)
    return {} if found is None else {path: found}


def describe(value: Any) -> str:
    """A value in a few words."""
    if isinstance(value, Tensor):
        return _described_tensor(value)
    if isinstance(value, np.ndarray):
        return f"numpy {value.dtype} {value.shape}"
    if isinstance(value, GENERATORS):
        return f"{type(value).__module__}.{type(value).__name__}"
    if isinstance(value, Mapping):
        shown = [f"{k!r}: {describe(v)}" for k, v in itertools.islice(value.items(), 3)]
        return f"{{{_joined(shown, len(value))}}}"
    if isinstance(value, (*_SEQUENCES, set, frozenset)):
        # The end of a list that grows tells more than its beginning.
        tail = [describe(v) for v in itertools.islice(value, max(0, len(value) - 3), None)]
        more = "..., " if len(value) > 3 else ""
        return f"[{more}{', '.join(tail)}] ({len(value)} items)"
    if isinstance(value, (*_SCALARS, np.generic)):
        text = repr(value)
        return text if len(text) <= 60 else f"{text[:57]}..."
    return type(value).__qualname__


def _joined(shown: list[str], length: int) -> str:
    return ", ".join(shown) + (f", ... {length} in all" if length > len(shown) else "")


def _described_tensor(tensor: Tensor) -> str:
    kind = f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
    if tensor.numel() == 0 or tensor.layout is not torch.strided:
        return kind
    if tensor.numel() == 1:
        return f"{kind} {tensor.detach().reshape(()).tolist()!r}"
    if tensor.is_complex():
        return kind
    # With it, a difference of the last bit is told from one of another value altogether.
    return f"{kind}, mean {tensor.detach().double().mean().item()!r}"


def _children(tree: Any) -> Mapping[Any, Any] | None:
    """What a node is walked through by; None for a leaf."""
    if isinstance(tree, Mapping):
        return tree
    if isinstance(tree, _SEQUENCES):
        return dict(enumerate(tree))
    is_leaf = isinstance(tree, (Tensor, np.ndarray, np.generic, *_SCALARS, *GENERATORS))
    if is_leaf or isinstance(tree, (set, frozenset, type, nn.Module)):
        return None
    return getattr(tree, "__dict__", None)


def _feed(hasher: Any, value: Any, home: str | None, depth: int) -> None:
    """Add a value to a hash, tagged by kind so that no two values feed alike.

    Raises:
        OpaqueError: the value as a whole is opaque. Opaque parts of it count by their class.
    """
    if depth > _MOST_DEPTH:  # a circle of references
        return
    if isinstance(value, Tensor):
        _feed_tensor(hasher, value)
    elif isinstance(value, (np.ndarray, np.generic)):
        array = np.asarray(value)
        if array.dtype.hasobject:
            raise OpaqueError
        hasher.update(f"array {array.dtype} {array.shape} ".encode())
        hasher.update(np.ascontiguousarray(array).tobytes())
    elif isinstance(value, GENERATORS):
        _feed(hasher, generator_state(value), home, depth)
    elif isinstance(value, (*_SCALARS, itertools.count)):
        text = repr(value)
        hasher.update(f"{type(value).__name__} {len(text)} {text} ".encode())
    elif isinstance(value, Mapping):
        _feed_items(hasher, "mapping", value.items(), len(value), home, depth, is_ordered=False)
    elif isinstance(value, (set, frozenset)):
        _feed_items(hasher, "set", value, len(value), home, depth, is_ordered=False)
    elif isinstance(value, _SEQUENCES):
        _feed_items(hasher, "sequence", value, len(value), home, depth, is_ordered=True)
    elif _is_at_home(value, home):
        hasher.update(f"object {type(value).__qualname__} ".encode())
        _feed(hasher, vars(value), home, depth + 1)
    else:
        raise OpaqueError


def _feed_items(
    hasher: Any,
    kind: str,
    items: Any,
    length: int,
    home: str | None,
    depth: int,
    *,
    is_ordered: bool,
) -> None:
    hasher.update(f"{kind} {length} ".encode())
    digests = []
    for item in itertools.islice(items, _MOST_ITEMS):
        part = hashlib.sha256()
        try:
            _feed(part, item, home, depth + 1)
        except OpaqueError:
            part.update(type(item).__qualname__.encode())
        digests.append(part.digest())
    for digest in digests if is_ordered else sorted(digests):
        hasher.update(digest)


def _feed_tensor(hasher: Any, tensor: Tensor) -> None:
    hasher.update(f"tensor {tensor.dtype} {tuple(tensor.shape)} ".encode())
    tensor = tensor.detach()
    if hasattr(tensor, "full_tensor"):
        tensor = tensor.full_tensor()
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    flat = tensor.cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    if flat.numel():
        hasher.update(flat.view(torch.uint8).numpy().data)


def _is_at_home(value: Any, home: str | None) -> bool:
    if home is None or isinstance(value, _NEVER_AT_HOME):
        return False
    return hasattr(value, "__dict__") and type(value).__module__.partition(".")[0] == home
