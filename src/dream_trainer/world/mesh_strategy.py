"""FSDP2, HSDP and tensor parallel as one Fabric strategy over one named device mesh."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.precision import MixedPrecision, Precision
from lightning.fabric.strategies import ModelParallelStrategy
from lightning.fabric.strategies.strategy import _BackwardSyncControl
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy
from torch.optim import Optimizer

from dream_trainer.configs import DeviceParameters
from dream_trainer.configs.device import Size
from dream_trainer.errors import ConfigError, StateError
from dream_trainer.storage import Ranks, flatten, read_tree, save_directory
from dream_trainer.world.blocks import shard_blocks
from dream_trainer.world.component_state import (
    clean_name,
    gradients,
    load_module_state,
    load_optimizer_state,
    module_problems,
    module_state,
    optimizer_problems,
    optimizer_state,
    parameter_names,
    state_template,
)
from dream_trainer.world.gradient_norm import clip_to_norm
from dream_trainer.world.gradient_sync import no_gradient_sync
from dream_trainer.world.materialize import initialize, layers_on_meta, materialize
from dream_trainer.world.sharded_precision import ShardedMixedPrecision, ShardedPrecision

DP_REPLICATE, DP_SHARD, TP = "dp_replicate", "dp_shard", "tp"

#: Applies parallelism to a module: ``parallelize(module, strategy) -> module``.
Parallelize = Callable[[nn.Module, "MeshStrategy"], nn.Module]


def _parallelize(module: nn.Module, strategy: MeshStrategy) -> nn.Module:
    if strategy.tp_size > 1:
        raise ConfigError(
            "MeshStrategy",
            [
                f"tensor_parallel={strategy.tp_size}, but nothing says how to split "
                f"{type(module).__name__}"
            ],
            "Pass parallelize=, which splits over strategy.device_mesh['tp'] and then shards.",
        )
    shard_blocks(module, **strategy.fsdp_arguments)
    return module


class _GradientSyncControl(_BackwardSyncControl):
    """Fabric's own one leaves gradient sync off after a block with ``enabled=False``."""

    def no_backward_sync(self, module: nn.Module, enabled: bool) -> AbstractContextManager[None]:
        return no_gradient_sync([module]) if enabled else nullcontext()


class MeshStrategy(ModelParallelStrategy):
    """Shard models with FSDP2, replicate shards (HSDP), split layers (tensor parallel).

    The mesh has the dimensions ``dp_replicate``, ``dp_shard`` and ``tp``, those above 1 only.
    Mixed precision is FSDP2's policy (parameters in half, reductions in float32), with autocast for
    what meets in several types.
    Runs on CUDA and, over gloo, on CPU ranks. Use it through ``DeviceParameters``, or alone:

        fabric = Fabric(devices=2, strategy=MeshStrategy(dp_shard=2))

    Args:
        dp_replicate: copies of the model.
        dp_shard: ranks one copy is sharded over; ``"auto"`` takes what is left.
        tensor_parallel: ranks one layer is split over; needs a ``parallelize`` of your own.
        parallelize: applies parallelism to each module given to ``setup``:
            ``parallelize(module, strategy) -> module``. The default shards each block of the
            largest ``ModuleList`` objects, then the root (`shard_blocks`), with
            ``strategy.fsdp_arguments``.
        param_dtype: what parameters and inputs are cast to for computing; by default what
            ``precision`` says, half for ``"bf16-mixed"`` and ``"16-mixed"``.
        reduce_dtype: what gradients are reduced in; by default float32 in mixed precision, the
            type of the parameters otherwise.
        cpu_offload: keep shards in CPU memory between uses.
        timeout: how long a collective waits for the other ranks.

    Attributes:
        initializes_modules: whether ``setup_module`` initialises what was on the meta device.
    """

    def __init__(
        self,
        dp_replicate: Size = 1,
        dp_shard: Size = "auto",
        tensor_parallel: Size = 1,
        *,
        parallelize: Parallelize = _parallelize,
        param_dtype: torch.dtype | None = None,
        reduce_dtype: torch.dtype | None = None,
        cpu_offload: bool = False,
        timeout: timedelta = timedelta(seconds=600),
    ) -> None:
        self.param_dtype, self.reduce_dtype = param_dtype, reduce_dtype
        super().__init__(
            parallelize_fn=lambda module, mesh: self.parallelize(module, self), timeout=timeout
        )
        self.sizes = DeviceParameters(
            dp_replicate=dp_replicate, dp_shard=dp_shard, tensor_parallel=tensor_parallel
        )
        self.parallelize = parallelize
        self.cpu_offload = cpu_offload
        self.initializes_modules = True
        self._backward_sync_control = _GradientSyncControl()

    @property
    def precision(self) -> Precision:
        """The precision plugin; mixed precision is one that knows FSDP2's policy."""
        return super().precision

    @precision.setter
    def precision(self, precision: Precision | None) -> None:
        if isinstance(precision, MixedPrecision):
            precision = ShardedMixedPrecision(precision)
        elif self.param_dtype is not None and type(precision) in (Precision, type(None)):
            precision = ShardedPrecision()
        self._precision = precision

    @property
    def precision_name(self) -> str:
        """The precision that was asked for, in Fabric's names."""
        return "32-true" if self._precision is None else str(self._precision.precision)

    @property
    def mixed_precision_policy(self) -> MixedPrecisionPolicy:
        """In what FSDP2 computes, and in what it reduces gradients."""
        parameters, reductions = self.param_dtype, self.reduce_dtype
        if isinstance(self._precision, MixedPrecision):
            half = torch.bfloat16 if self.precision_name.startswith("bf16") else torch.float16
            parameters, reductions = parameters or half, reductions or torch.float32
        return MixedPrecisionPolicy(param_dtype=parameters, reduce_dtype=reductions)

    @property
    def fsdp_arguments(self) -> dict[str, Any]:
        """Arguments of ``fully_shard`` for this mesh, precision and offload setting."""
        names = [name for name in (DP_REPLICATE, DP_SHARD) if name in self._dimensions]
        arguments: dict[str, Any] = {"mesh": self._whole_mesh[tuple(names)]}
        policy = self.mixed_precision_policy
        if policy != MixedPrecisionPolicy():
            arguments["mp_policy"] = policy
        if self.cpu_offload:
            on_cuda = self.root_device.type == "cuda"
            arguments["offload_policy"] = CPUOffloadPolicy(pin_memory=on_cuda)
        return arguments

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Number of data-parallel ranks and the index of this one."""
        return {"num_replicas": self.dp_size, "rank": self.dp_rank}

    @property
    def dp_size(self) -> int:
        """Data-parallel ranks: ``dp_replicate`` x ``dp_shard``."""
        return self.world_size // self.tp_size

    @property
    def dp_rank(self) -> int:
        """Index of this rank among the data-parallel ones."""
        return self.global_rank // self.tp_size

    @property
    def tp_size(self) -> int:
        """Ranks that share one data-parallel index."""
        size = self.sizes.tensor_parallel
        return 1 if size == "auto" else size

    @property
    def tp_rank(self) -> int:
        """Index of this rank among those."""
        return self.global_rank % self.tp_size

    def setup_environment(self) -> None:
        """Join the process group and build the mesh."""
        assert self.accelerator is not None
        self.accelerator.setup_device(self.root_device)
        self._setup_distributed()
        self.sizes = self.sizes.resolve(self.world_size)
        dimensions = self._dimensions
        self._whole_mesh = self.make_mesh(dimensions)
        above = tuple(name for name, size in dimensions.items() if size > 1)
        self._device_mesh = self._whole_mesh[above or (DP_SHARD,)]
        if self.global_rank:
            # torch's, about in-place changes of a block's output: told once, not by every rank.
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")

    def make_mesh(self, dimensions: Mapping[str, int]) -> DeviceMesh:
        """A mesh over all ranks, in their order.

        Args:
            dimensions: name -> size, outermost first.
        """
        return init_device_mesh(
            self.root_device.type, tuple(dimensions.values()), mesh_dim_names=tuple(dimensions)
        )

    def setup_module(self, module: nn.Module) -> nn.Module:
        """Apply ``parallelize``; give what was made on the meta device memory and values.

        Only the own shards get memory. Layers are initialised by their ``reset_parameters``, to
        the values they would have on one device.

        Raises:
            ConfigError: something on the meta device is initialised by no layer.
        """
        layers = layers_on_meta(module)
        module = self.parallelize(module, self)
        if not isinstance(module, nn.Module):
            raise TypeError(f"parallelize returned a {type(module).__name__}, not a module")
        if not layers:
            is_sharded = any(isinstance(part, FSDPModule) for part in module.modules())
            # What parallelize left whole is still where it was made; offloaded shards stay there.
            return module if is_sharded and self.cpu_offload else module.to(self.root_device)
        cpu = torch.device("cpu")
        materialize(module, self.root_device, cpu if self.cpu_offload else self.root_device)
        if self.initializes_modules:
            initialize(self, {"": module}, layers)
        return module

    def setup_module_and_optimizers(
        self, module: nn.Module, optimizers: list[Optimizer], scheduler: Any = None
    ) -> tuple[nn.Module, list[Optimizer], Any]:
        """Shard the module and let optimizers made before follow it to the new parameters.

        Otherwise they would keep stepping the unsharded ones, which nothing uses any more.
        """
        # Recomputed and compiled parts get other names.
        old = {id(p): clean_name(name) for name, p in module.named_parameters()}
        module = self.setup_module(module)
        new = {clean_name(name): p for name, p in module.named_parameters()}
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["params"] = [new[old[id(p)]] if id(p) in old else p for p in group["params"]]
        return module, optimizers, scheduler

    def save_checkpoint(
        self,
        path: str | Path,
        state: dict[str, Any],
        storage_options: Any | None = None,
        filter: dict[str, Callable[[str, Any], bool]] | None = None,
    ) -> None:
        """Write a checkpoint directory; any number of models, optimizers and stateful objects.

        The directory appears whole or not at all.
        """
        if storage_options is not None:
            raise TypeError("storage_options: MeshStrategy writes to file systems only")
        models = {key: value for key, value in state.items() if isinstance(value, nn.Module)}
        names = parameter_names(models)
        tree: dict[str, Any] = {"models": {}, "optimizers": {}, "other": {}}
        for key, value in state.items():
            if isinstance(value, nn.Module):
                kind, content = "models", module_state(value)
            elif isinstance(value, Optimizer):
                kind, content = "optimizers", optimizer_state(value, names)
            else:
                kind = "other"
                content = value.state_dict() if hasattr(value, "state_dict") else value
            if filter and key in filter and isinstance(content, dict):
                content = {k: v for k, v in content.items() if filter[key](k, v)}
            tree[kind][key] = content
        target = Path(self.broadcast(str(path)))
        ranks = Ranks(self.global_rank, self.world_size)
        save_directory(target, flatten(tree, {}, rank=ranks.rank), ranks, step=0, epoch=0)

    def load_checkpoint(
        self,
        path: str | Path,
        state: nn.Module | Optimizer | dict[str, Any] | None = None,
        strict: bool = True,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Restore the objects in ``state`` in place; return what was not asked for.

        Stateful objects get their ``load_state_dict`` called, other values are put into
        ``state``. Only plain data and tensors are ever unpickled.
        """
        source = Path(self.broadcast(str(path)))
        if isinstance(state, (nn.Module, Optimizer)) or source.is_file():
            return super().load_checkpoint(source, state, strict, weights_only)
        state = {} if state is None else state
        models = {key: value for key, value in state.items() if isinstance(value, nn.Module)}
        names = parameter_names(models)
        tree, _ = read_tree(source, state_template(models), rank=self.global_rank)
        kinds = {key: kind for kind, entries in tree.items() for key in entries}
        problems = [f"{key}: not in the checkpoint" for key in state if key not in kinds]
        found = [key for key in state if key in kinds]
        content = {key: tree[kinds[key]].pop(key) for key in found}
        for key in found:
            value = state[key]
            if isinstance(value, nn.Module):
                problems += [f"{key}.{p}" for p in module_problems(value, content[key])]
            elif isinstance(value, Optimizer):
                found_there = optimizer_problems(value, content[key], names, models)
                problems += [f"{key}.{problem}" for problem in found_there]
        if problems and strict:
            raise StateError(str(source), problems, "Pass strict=False to load what fits.")
        for key in found:
            value = state[key]
            if isinstance(value, nn.Module):
                load_module_state(value, content[key])
            elif isinstance(value, Optimizer):
                load_optimizer_state(value, content[key], names, models)
            elif hasattr(value, "load_state_dict"):
                value.load_state_dict(content[key])
            else:
                state[key] = content[key]
        return {key: value for entries in tree.values() for key, value in entries.items()}

    def clip_gradients_norm(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = True,
    ) -> Tensor:
        """Clip by norm, over parameters on any part of the mesh; the norm is a plain tensor."""
        self.precision.unscale_gradients(optimizer)
        return clip_to_norm(
            gradients([optimizer]),
            max_norm,
            norm_type=norm_type,
            error_if_nonfinite=error_if_nonfinite,
        )

    def _get_process_group_backend(self) -> str:
        if self.cpu_offload and self.root_device.type == "cuda":
            return "cpu:gloo,cuda:nccl"  # optimizer state is in CPU memory, and is gathered there
        return str(super()._get_process_group_backend())

    @property
    def _dimensions(self) -> dict[str, int]:
        """Sizes above 1, and ``dp_shard`` always.

        Over one rank it shards nothing, but ``fully_shard`` brings what every layout needs: mixed
        precision, offload, and gradients of split layers that are laid out like the parameters.
        """
        sizes = {
            DP_REPLICATE: self.sizes.dp_replicate,
            DP_SHARD: self.sizes.dp_shard,
            TP: self.sizes.tensor_parallel,
        }
        return {
            name: size
            for name, size in sizes.items()
            if size != "auto" and (size > 1 or name == DP_SHARD)
        }
