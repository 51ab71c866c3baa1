"""State as a tree: nested containers of plain values and tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

Tree = Any
TreePath = tuple[str | int, ...]

_PLAIN: tuple[Any, ...] = (bool, int, float, complex, str, bytes)


def join(path: TreePath) -> str:
    """The dotted name of a place in a tree."""
    return ".".join(str(part) for part in path)


def tensor_leaves(tree: Tree, path: TreePath = ()) -> Iterator[tuple[TreePath, Tensor]]:
    """Every tensor of a tree with its path."""
    if isinstance(tree, Tensor):
        yield path, tree
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from tensor_leaves(value, (*path, key))
    elif isinstance(tree, (list, tuple)):
        for index, value in enumerate(tree):
            yield from tensor_leaves(value, (*path, index))


def split(tree: Tree) -> tuple[Tree, dict[TreePath, Tensor]]:
    """Separate a tree into plain data, with None where a tensor was, and its tensors.

    Subclasses of plain types (a numpy float, an enum) become the plain value.

    Raises:
        TypeError: naming the path of every leaf that is neither plain nor a tensor.
    """
    tensors: dict[TreePath, Tensor] = {}
    problems: list[str] = []

    def visit(node: Tree, path: TreePath) -> Tree:
        if isinstance(node, Tensor):
            tensors[path] = node
            return None
        if isinstance(node, Mapping):
            return {_key(key, path): visit(value, (*path, key)) for key, value in node.items()}
        if isinstance(node, (list, tuple)):
            items = [visit(value, (*path, index)) for index, value in enumerate(node)]
            return items if isinstance(node, list) else tuple(items)
        if node is None or type(node) in _PLAIN:
            return node
        if type(node) is set and all(type(item) in _PLAIN for item in node):
            return set(node)
        if isinstance(node, str):
            return str.__str__(node)  # str() of an enum would be its name
        for plain in _PLAIN:
            if isinstance(node, plain):
                return plain(node)
        problems.append(f"{join(path)} is a {type(node).__module__}.{type(node).__qualname__}")
        return None

    def _key(key: Any, path: TreePath) -> Any:
        if type(key) not in (str, int):
            problems.append(f"{join(path)} has the key {key!r}; keys are str or int")
        return key

    skeleton = visit(tree, ())
    if problems:
        raise TypeError(
            "state must be nested plain data and tensors, so that it loads safely:\n  - "
            + "\n  - ".join(problems)
            + "\nStore a str, number, list, dict or tensor instead."
        )
    return skeleton, tensors


def merge(skeleton: Tree, tensors: Mapping[TreePath, Tensor]) -> Tree:
    """The inverse of `split`."""
    if not tensors:
        return skeleton

    def visit(node: Tree, path: TreePath) -> Tree:
        if path in tensors:
            return tensors[path]
        if isinstance(node, dict):
            return {key: visit(value, (*path, key)) for key, value in node.items()}
        if isinstance(node, (list, tuple)):
            items = [visit(value, (*path, index)) for index, value in enumerate(node)]
            return items if isinstance(node, list) else tuple(items)
        return node

    return visit(skeleton, ())
