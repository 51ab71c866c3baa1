"""How state becomes files: plain trees, torch distributed checkpoints, manifests, atomic writes."""

from typing import TYPE_CHECKING

from dream_trainer.lazy_names import lazy_names

if TYPE_CHECKING:
    from dream_trainer.storage.aside import free_name, move_aside
    from dream_trainer.storage.atomic import atomic_file, write_text
    from dream_trainer.storage.collective import Ranks
    from dream_trainer.storage.dcp import (
        Like,
        flatten,
        read_outline,
        read_outlines,
        read_parts,
        read_tensors,
        read_tree,
    )
    from dream_trainer.storage.directory import save_directory
    from dream_trainer.storage.manifest import FORMAT_VERSION, Manifest
    from dream_trainer.storage.staging import StagedState, StagingBuffers, address
    from dream_trainer.storage.tree import Tree, TreePath, join, split, tensor_leaves

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "atomic": "atomic_file write_text",
        "collective": "Ranks",
        "dcp": "Like flatten read_outline read_outlines read_parts read_tensors read_tree",
        "aside": "free_name move_aside",
        "directory": "save_directory",
        "manifest": "FORMAT_VERSION Manifest",
        "staging": "StagedState StagingBuffers address",
        "tree": "Tree TreePath join split tensor_leaves",
    },
    globals(),
)

__all__ = [
    "FORMAT_VERSION",
    "Like",
    "Manifest",
    "Ranks",
    "StagedState",
    "StagingBuffers",
    "Tree",
    "TreePath",
    "address",
    "atomic_file",
    "flatten",
    "free_name",
    "join",
    "move_aside",
    "read_outline",
    "read_outlines",
    "read_parts",
    "read_tensors",
    "read_tree",
    "save_directory",
    "split",
    "tensor_leaves",
    "write_text",
]
