"""What is sharded: DTensors and FSDP2 modules, known without loading what makes them."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from typing_extensions import TypeIs

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor


def is_dtensor(value: object) -> TypeIs[DTensor]:
    """Whether a tensor is sharded or split."""
    # Nobody has one without this module, which takes half as long to load as torch itself.
    kinds = sys.modules.get("torch.distributed.tensor")
    return isinstance(value, getattr(kinds, "DTensor", ()))


def is_fsdp_module(value: object) -> TypeIs[FSDPModule]:
    """Whether ``fully_shard`` was applied to a module."""
    kinds = sys.modules.get("torch.distributed.fsdp")
    return isinstance(value, getattr(kinds, "FSDPModule", ()))
