"""Gradient synchronisation: off for a block and back, and in the same order in every process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dream_trainer.errors import ConfigError
from dream_trainer.world.sharded import is_fsdp_module
from dream_trainer.world.wrappers import forward_module


@contextmanager
def no_gradient_sync(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Accumulate gradients locally in backward passes inside the block.

    Forward and backward must both run inside. Works for every DDP and FSDP2 module found in
    ``modules``; on one device there is nothing to do.

    Raises:
        ConfigError: DDP has a static graph, and would fail inside of torch.
    """
    with ExitStack() as stack:
        for module in modules:
            for part in _candidates(module):
                if isinstance(part, DistributedDataParallel):
                    if part.static_graph:
                        raise ConfigError(
                            "gradient accumulation",
                            ["DDP with static_graph=True counts on every backward pass"],
                            "Leave static_graph off, or take larger batches.",
                        )
                    stack.enter_context(part.no_sync())
                elif is_fsdp_module(part):
                    part.set_requires_gradient_sync(False, recurse=False)
                    # Left off, the next plain backward would leave every gradient None.
                    stack.callback(part.set_requires_gradient_sync, True, recurse=False)
        yield


def _candidates(module: nn.Module) -> Iterable[nn.Module]:
    """Where DDP and FSDP2 modules may be: not below DDP, a walk in every accumulating batch."""
    outer = forward_module(module)
    return [outer] if isinstance(outer, DistributedDataParallel) else outer.modules()


class ManualBackward:
    """Lets a forward pass hold backward passes of its own, and DDP reduce each of them.

    DDP gets ready to reduce when its ``forward`` is over, which is too late for these: the first
    ones would leave every rank its own gradients.

    Args:
        module: as Fabric wrapped it; one whose strategy is DDP, or has nothing to reduce.
    """

    def __init__(self, module: nn.Module) -> None:
        inner = forward_module(module)
        self._ddp = inner if isinstance(inner, DistributedDataParallel) else None

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Around the pass, which calls the module itself and not its wrappers."""
        if self._ddp is not None:
            self._ddp._pre_forward()  # buffers of rank 0, buckets in their final order
        yield

    def prepare(self, loss: Tensor) -> None:
        """Before each backward pass inside."""
        ddp = self._ddp
        if ddp is not None and ddp.require_backward_grad_sync:
            # What the loss reaches is what will come; other gradients are not waited for.
            ddp.reducer.prepare_for_backward([loss] if ddp.find_unused_parameters else [])


def fix_bucket_order(module: nn.Module) -> None:
    """Give every DDP module its final gradient buckets before the first step. A collective.

    DDP puts all gradients in one bucket first, and after a process's first backward into new ones
    in the order that gradients came. On three or more ranks the place in a bucket decides in
    which order ranks are added, so the first step after a restart would round differently. Here
    gradients of zero come once, last parameter first, the order of a usual backward pass. Costs
    one all-reduce of all gradients.
    """
    for part in module.modules():
        # With find_unused_parameters the first buckets stay; a static graph records its own.
        if not isinstance(part, DistributedDataParallel) or part.find_unused_parameters:
            continue
        if part.static_graph:
            continue
        trained = [p for p in part.module.parameters() if p.requires_grad]
        sparse = {
            id(layer.weight)
            for layer in part.module.modules()
            if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)) and layer.sparse
        }
        part.reducer.prepare_for_backward([])
        for parameter in reversed(trained):
            parameter.backward(_zeros(parameter, is_sparse=id(parameter) in sparse))
        for parameter in trained:
            parameter.grad = None  # a gradient of zero would make an optimizer step


def keep_reducing_gradients(modules: Iterable[nn.Module]) -> None:
    """Have DDP modules reduce the gradients that are there, whatever the next pass uses.

    With find_unused_parameters DDP reduces what it saw used since it reduced last, and one that
    was made in the middle of a window saw nothing: gradients from before would stay each rank's
    own, and the copies of the model drift apart. No collective.
    """
    for part in (part for module in modules for part in module.modules()):
        if not (isinstance(part, DistributedDataParallel) and part.find_unused_parameters):
            continue
        for parameter in (p for p in part.module.parameters() if p.requires_grad):
            if (gradient := parameter.grad) is not None:
                parameter.grad = None
                parameter.backward(_zeros(parameter, is_sparse=gradient.is_sparse))
                parameter.grad = gradient


def _zeros(parameter: nn.Parameter, *, is_sparse: bool) -> Tensor:
    """A gradient of zero, of the kind that DDP expects."""
    if not is_sparse:
        return torch.zeros_like(parameter)
    rows = torch.zeros(1, 1, dtype=torch.long, device=parameter.device)
    return torch.sparse_coo_tensor(rows, torch.zeros_like(parameter[:1]), parameter.shape)
