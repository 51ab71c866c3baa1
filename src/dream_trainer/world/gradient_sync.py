"""Gradient synchronisation off for a block, and back as it was."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel


@contextmanager
def no_gradient_sync(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Accumulate gradients locally in backward passes inside the block.

    Forward and backward must both run inside. Works for every DDP and FSDP2 module found in
    ``modules``; on one device there is nothing to do.
    """
    with ExitStack() as stack:
        for module in modules:
            for part in module.modules():
                if isinstance(part, DistributedDataParallel):
                    stack.enter_context(part.no_sync())
                elif isinstance(part, FSDPModule):
                    part.set_requires_gradient_sync(False, recurse=False)
                    # Left off, the next plain backward would leave every gradient None.
                    stack.callback(part.set_requires_gradient_sync, True, recurse=False)
        yield
