"""Models made on the meta device: memory for the own shard only, values as on one device."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from weakref import ref

import torch
import torch.distributed as dist
from lightning.fabric.strategies import Strategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from dream_trainer.errors import ConfigError
from dream_trainer.world.component_state import clean_name

#: In-place operations that do not read what they overwrite, so nothing need be gathered for them.
_OVERWRITING = {"normal_", "uniform_", "zero_", "fill_", "copy_", "exponential_", "random_"}


def is_on_meta(module: nn.Module) -> bool:
    """Whether any parameter or buffer has no memory yet."""
    return any(tensor.is_meta for _, tensor in _tensors(module))


def materialize(module: nn.Module, device: torch.device, parameter_device: torch.device) -> None:
    """Give what is on the meta device memory; of a sharded parameter the own shard only.

    Parameters and buffers that are shared stay shared. Until something is written into them they
    hold NaN (whole numbers: the smallest there is; bools: no bool at all), so that `initialize`
    finds them.

    Args:
        module: sharded or split already, if it is to be.
        device: where buffers go.
        parameter_device: where sharded parameters go.
    """
    made: dict[int, tuple[Tensor, Tensor]] = {}  # the old ones stay alive, so ids are theirs
    for part in module.modules():
        own = dict(part.named_parameters(recurse=False, remove_duplicate=False))
        own |= dict(part.named_buffers(recurse=False, remove_duplicate=False))  # type: ignore[arg-type]
        for name, tensor in own.items():
            if not tensor.is_meta:
                continue
            if id(tensor) not in made:
                target = parameter_device if isinstance(tensor, DTensor) else device
                new = _unwritten(torch.empty_like(tensor.detach(), device=target))
                if isinstance(tensor, nn.Parameter):
                    new = nn.Parameter(new, tensor.requires_grad)
                made[id(tensor)] = tensor, new
            setattr(part, name, made[id(tensor)][1])
    if any(isinstance(part, FSDPModule) for part in module.modules()):
        module._apply(lambda tensor: tensor)  # FSDP2 looks at its parameters anew


def layers_on_meta(module: nn.Module) -> list[nn.Module]:
    """Modules with something on the meta device in them, each after its children.

    That is the order in which constructors initialise.
    """
    found = [layer for child in module.children() for layer in layers_on_meta(child)]
    if found or is_on_meta(module):
        found.append(module)
    return list({id(layer): layer for layer in found}.values())


def initialize(
    strategy: Strategy,
    modules: Mapping[str, nn.Module],
    layers: Iterable[nn.Module],
    init_weights: Callable[[], None] = lambda: None,
    next_move: str = "Write them in init_weights, or in a reset_parameters of their module.",
) -> None:
    """Initialise modules that were on the meta device. A collective.

    Layers first, as their constructors would have (``reset_parameters``), then ``init_weights``.
    Random numbers are those that one device would draw from the generators of rank 0.

    Raises:
        ConfigError: on every rank, naming each parameter and buffer that is on meta or was never
            written.
    """
    with _generators_of_rank_0(strategy), like_one_device(modules.values()):
        for layer in layers:
            reset = getattr(layer, "reset_parameters", None)
            reset = reset or getattr(layer, "_reset_parameters", None)
            if callable(reset):
                reset()
        init_weights()
    problems = _uninitialized(modules)
    if dist.is_available() and dist.is_initialized():
        # A rank without a row of a parameter cannot tell, but must not run on alone.
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, problems)
        problems = {name: problem for found in gathered for name, problem in found.items()}
    if problems:
        lines = [f"{name} {problem}" for name, problem in sorted(problems.items())]
        raise ConfigError("init_weights", lines, next_move)


def _uninitialized(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Name -> what is wrong with it, as far as this rank can see. A host sync for each tensor."""
    problems = {}
    for model_name, module in modules.items():
        for name, tensor in _tensors(module):
            full_name = clean_name(f"{model_name}.{name}" if model_name else name)
            if tensor.is_meta:
                problems[full_name] = "is on the meta device"
            elif _is_unwritten(tensor):
                problems[full_name] = "has memory, but nothing was ever written into it"
    return problems


@contextmanager
def _generators_of_rank_0(strategy: Strategy) -> Iterator[None]:
    """Draw as rank 0 would; a rank whose generators were its own gets them back."""
    device = strategy.root_device
    on_cuda = device.type == "cuda"

    def states() -> list[Tensor]:
        return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if on_cuda else [])

    def set_states(states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        if on_cuda:
            torch.cuda.set_rng_state(states[1], device)

    own = states()
    shared = strategy.broadcast(own)
    set_states(shared)
    yield
    if not all(map(torch.equal, own, shared)):
        set_states(own)


def like_one_device(modules: Iterable[nn.Module]) -> AbstractContextManager[Any]:
    """Inside, what is done to sharded parameters has the result that it has on one device.

    Without it each rank draws the random numbers of its own shard, and writing to a part of a
    parameter (the padding row of an embedding) writes to a copy.
    """
    sharded = any(isinstance(p, DTensor) for module in modules for p in module.parameters())
    return _LikeOneDevice() if sharded else nullcontext()


class _LikeOneDevice(TorchDispatchMode):
    """Runs each operation on sharded tensors on the whole of them, and keeps the own shard.

    One whole parameter at a time is in memory, unless views of more are kept. Ranks must do the
    same operations in the same order, with generators in the same state.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # Storage of a whole tensor -> it, the sharded one it stands for, and views still in use.
        self._open: dict[int, tuple[Tensor, DTensor, list[ref[Tensor]]]] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        sharded = [leaf for leaf in leaves if isinstance(leaf, DTensor)]
        if func is torch.ops.aten.detach.default and sharded:
            return func(*args, **kwargs)  # it is the parameter itself, its shards are the same
        if not sharded and not self._open:
            return func(*args, **kwargs)
        written = _written(func, args, kwargs)
        reads_target = func.overloadpacket.__name__ not in _OVERWRITING
        whole: dict[int, Tensor] = {}
        for tensor in sharded:
            if id(tensor) not in whole:
                is_target = any(tensor is one for one in written)
                whole[id(tensor)] = self._whole(tensor, gather=reads_target or not is_target)
        args, kwargs_ = tree_map(lambda leaf: whole.get(id(leaf), leaf), (args, kwargs))
        result = func(*args, **kwargs_)
        for target in written:
            self._keep(whole.get(id(target), target), target)
        self._note_views(result, whole, sharded)
        back = {id(whole[id(one)]): one for one in written if id(one) in whole}
        return tree_map(lambda leaf: back.get(id(leaf), leaf), result)

    def _whole(self, tensor: DTensor, *, gather: bool) -> Tensor:
        for whole, owner, _ in self._open.values():
            if owner is tensor:
                return whole
        if gather:
            gathered: Tensor = tensor.full_tensor()
            own = own_shard(tensor)
            return gathered.clone() if gathered.data_ptr() == own.data_ptr() else gathered
        device = torch.device(tensor.device_mesh.device_type)
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)

    def _keep(self, whole: Tensor, tensor: Tensor) -> None:
        """Take the own shard of what was written, directly or through a view."""
        if isinstance(tensor, DTensor):
            own_shard(tensor).copy_(shard_of(whole, tensor))
        elif (opened := self._open.get(tensor.untyped_storage().data_ptr())) is not None:
            base, owner, _ = opened
            own_shard(owner).copy_(shard_of(base, owner))

    def _note_views(self, result: Any, whole: dict[int, Tensor], sharded: list[DTensor]) -> None:
        self._open = {
            key: (base, owner, alive)
            for key, (base, owner, views) in self._open.items()
            if (alive := [view for view in views if view() is not None])
        }
        bases = {whole[id(t)].untyped_storage().data_ptr(): (whole[id(t)], t) for t in sharded}
        bases |= {key: (base, owner) for key, (base, owner, _) in self._open.items()}
        for leaf in tree_leaves(result):
            if not isinstance(leaf, Tensor) or isinstance(leaf, DTensor):
                continue
            key = leaf.untyped_storage().data_ptr()
            if key in bases and not any(leaf is one for one in whole.values()):
                base, owner = bases[key]
                views = self._open[key][2] if key in self._open else []
                self._open[key] = (base, owner, [*views, ref(leaf)])


def own_shard(tensor: DTensor) -> Tensor:
    """The memory that this rank holds of a sharded tensor."""
    return tensor._local_tensor  # to_local() would be recorded by autograd


def shard_of(whole: Tensor, like: DTensor) -> Tensor:
    """The part of a whole tensor that this rank holds of ``like``. No collective."""
    mesh, part = like.device_mesh, whole
    shards = [(i, p) for i, p in enumerate(like.placements) if not isinstance(p, Replicate)]
    # FSDP2 shards what tensor parallel has split already, so its dimension comes after.
    for dimension, placement in sorted(shards, key=lambda one: type(one[1]).__name__ != "Shard"):
        coordinate = mesh.get_local_rank(dimension)
        axis = placement.dim  # type: ignore[attr-defined]
        pieces = torch.chunk(part, mesh.size(dimension), dim=axis)
        part = pieces[coordinate] if coordinate < len(pieces) else part.narrow(axis, 0, 0)
    return part


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The arguments that an operation changes."""
    found = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            found += [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    return found


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _unwritten(tensor: Tensor) -> Tensor:
    local, value = _marked(tensor)
    local.fill_(value)
    return tensor


def _is_unwritten(tensor: Tensor) -> bool:
    local, value = _marked(tensor)
    if not local.numel():
        return False
    return bool((local.isnan() if math.isnan(value) else local == value).all())


def _marked(tensor: Tensor) -> tuple[Tensor, float | int]:
    """The memory that this rank holds, and what is in it until something is written there."""
    local = own_shard(tensor) if isinstance(tensor, DTensor) else tensor.detach()
    if local.dtype.is_floating_point or local.dtype.is_complex:
        return local, math.nan
    if local.dtype == torch.bool:
        return local.view(torch.uint8), 255  # which no operation on bools gives
    info = torch.iinfo(local.dtype)
    return local, info.min or info.max
