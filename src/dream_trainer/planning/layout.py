"""Which ranks work together: the groups of a mesh, and the nodes that they lie on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from dream_trainer.configs import DeviceParameters
from dream_trainer.errors import ConfigError

#: The dimensions of a mesh by their option, outermost first; ranks are counted along the last.
DIMENSIONS = {"dp_replicate": "dp_replicate", "dp_shard": "dp_shard", "tp": "tensor_parallel"}


@dataclass(frozen=True)
class RankGroup:
    """The groups of one dimension: ranks that differ in nothing else."""

    dimension: str
    """``"dp_replicate"``, ``"dp_shard"`` or ``"tp"``."""
    size: int
    """Ranks of a group."""
    count: int
    """Groups."""
    stride: int
    """Distance between two neighbours of a group; the first group begins with rank 0."""
    nodes: int
    """Nodes that a group lies on, at most."""

    @property
    def first(self) -> str:
        """The ranks of the first group in words: ``"0-7"``, ``"0, 8, 16, ..., 56"``."""
        last = (self.size - 1) * self.stride
        if self.stride == 1 and self.size > 2:
            return f"0-{last}"
        ranks = range(0, last + 1, self.stride)
        if self.size <= 4:
            return ", ".join(map(str, ranks))
        return f"{', '.join(map(str, ranks[:3]))}, ..., {last}"


@dataclass(frozen=True)
class RankLayout:
    """The ranks of a run, their nodes and their groups."""

    num_ranks: int
    """Processes, one for each device."""
    ranks_per_node: int
    """Of them on one machine."""
    num_nodes: int
    """Machines."""
    sizes: Mapping[str, int]
    """Size of each dimension, those of 1 among them."""
    groups: tuple[RankGroup, ...]
    """One entry for each dimension above 1."""

    @property
    def dp_size(self) -> int:
        """Ranks that get different samples."""
        return self.num_ranks // self.sizes["tp"]

    def coordinate(self, rank: int) -> dict[str, int]:
        """Place of a rank in each dimension."""
        place: dict[str, int] = {}
        for name in reversed(list(self.sizes)):
            rank, place[name] = divmod(rank, self.sizes[name])
        return place


def layout_of(parameters: DeviceParameters, num_ranks: int, ranks_per_node: int) -> RankLayout:
    """The layout of resolved parameters.

    Args:
        parameters: resolved for ``num_ranks``.
        num_ranks: processes of the run.
        ranks_per_node: of them on one machine; with fewer ranks there is one machine.
    """
    per_node = min(ranks_per_node, num_ranks)
    sizes = {name: int(getattr(parameters, option)) for name, option in DIMENSIONS.items()}
    groups, stride = [], 1
    for name in reversed(sizes):
        if (size := sizes[name]) > 1:
            nodes = max(
                _nodes(first, size, stride, per_node) for first in _firsts(num_ranks, size, stride)
            )
            groups.append(RankGroup(name, size, num_ranks // size, stride, nodes))
        stride *= size
    return RankLayout(
        num_ranks, per_node, -(-num_ranks // per_node), sizes, tuple(reversed(groups))
    )


def node_problem(num_ranks: int, ranks_per_node: int) -> ConfigError | None:
    """Why so many ranks cannot be put on equal nodes, if so."""
    if num_ranks <= ranks_per_node or num_ranks % ranks_per_node == 0:
        return None
    return ConfigError(
        "plan",
        [f"{num_ranks} ranks do not fill nodes of {ranks_per_node}"],
        f"Ask for {num_ranks - num_ranks % ranks_per_node} or "
        f"{num_ranks + -num_ranks % ranks_per_node} ranks, or say how many a node has.",
    )


def layout_notes(layout: RankLayout) -> list[str]:
    """What of a layout costs more than its sizes say."""
    notes = []
    for group in layout.groups:
        if group.nodes == 1:
            continue
        if group.dimension == "tp":
            notes.append(
                f"a tensor_parallel group lies on {group.nodes} nodes: each split layer exchanges "
                "activations between nodes, forward and backward"
            )
        if group.dimension == "dp_shard" and layout.sizes["dp_replicate"] > 1:
            notes.append(
                f"a dp_shard group lies on {group.nodes} nodes: parameters are gathered between "
                "nodes, which HSDP with dp_shard inside a node avoids"
            )
    return notes


def _firsts(num_ranks: int, size: int, stride: int) -> Iterator[int]:
    """The first rank of each group."""
    for outer in range(0, num_ranks, size * stride):
        yield from range(outer, outer + stride)


def _nodes(first: int, size: int, stride: int, per_node: int) -> int:
    if stride >= per_node:
        return size  # no two on one node
    last = first + (size - 1) * stride
    # Neighbours are closer than a node is large, so none in between is passed over.
    return last // per_node - first // per_node + 1
