"""The repeated blocks of a model: what is sharded, recomputed and compiled one by one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a model: what is in its largest ``ModuleList`` objects.

    Largest by parameters; lists of at least half that size count as well, so that an encoder is
    not left out for its larger decoder. Lists inside of other lists belong to a block. In place of
    a module that cannot be called (a list in a list, a layer without ``forward``) stand its
    children. A block that is in there several times is named once.
    """
    outermost = list(_outermost_lists(module))
    sizes = [sum(p.numel() for p in part.parameters()) for part in outermost]
    large = [part for part, n in zip(outermost, sizes, strict=True) if n and 2 * n >= max(sizes)]
    blocks = {id(block): block for part in large for child in part for block in _callable(child)}
    return list(blocks.values())


def shard_blocks(module: nn.Module, **fsdp_arguments: Any) -> None:
    """Default sharding policy: each block on its own, then the root.

    A block that shares parameters with anything outside of it is left to the root, where they are
    gathered together.
    """
    from torch.distributed.fsdp import fully_shard

    blocks = blocks_of(module)
    uses: dict[int, int] = {}
    for parameter in _registered(module):
        uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    for block in blocks:
        inside = [id(parameter) for parameter in _registered(block)]
        if inside and all(inside.count(p) == uses[p] for p in set(inside)):
            fully_shard(block, **fsdp_arguments)
    fully_shard(module, **fsdp_arguments)


def _outermost_lists(module: nn.Module) -> Iterator[nn.ModuleList]:
    if isinstance(module, nn.ModuleList):
        yield module
        return
    for child in module.children():
        yield from _outermost_lists(child)


def _callable(module: nn.Module) -> Iterator[nn.Module]:
    if type(module).forward is not nn.Module.forward:
        yield module
        return
    for child in module.children():
        yield from _callable(child)


def _registered(module: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters, as often as different modules hold them."""
    for part in module.modules():
        yield from part.parameters(recurse=False)
