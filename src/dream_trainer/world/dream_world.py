"""DreamWorld: the one place where a trainer meets Lightning Fabric."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.fabric.strategies import (
    DDPStrategy,
    ModelParallelStrategy,
    ParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from lightning.fabric.wrappers import _FabricOptimizer
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from dream_trainer.configs import DeviceParameters
from dream_trainer.errors import ConfigError
from dream_trainer.storage import (
    Ranks,
    Tree,
    flatten,
    read_tree,
    save_directory,
    tensor_leaves,
)
from dream_trainer.world.component_state import gradients, unsharded_norm
from dream_trainer.world.direct import backward_of
from dream_trainer.world.dream_fabric import DreamFabric
from dream_trainer.world.gloo_threads import let_threads_finish_at_exit
from dream_trainer.world.gradient_norm import clip_to_norm
from dream_trainer.world.gradient_sync import no_gradient_sync
from dream_trainer.world.materialize import initialize as initialize_modules
from dream_trainer.world.mesh_strategy import MeshStrategy, Parallelize
from dream_trainer.world.module_setup import set_up
from dream_trainer.world.process_groups import DEFAULT_GROUP, SideGroup
from dream_trainer.world.processes import Children, run_on_ranks, spawns, starts_functions
from dream_trainer.world.restarts import fresh_store
from dream_trainer.world.strategy import fabric_arguments, refusal
from dream_trainer.world.wrappers import unwrap

T = TypeVar("T")
_NOTHING = nullcontext()
#: Strategies that leave parameters and gradients as torch has them, whole or as DTensors.
_PLAIN = (SingleDeviceStrategy, DDPStrategy, ModelParallelStrategy)
#: The older name warns on every rank from torch 2.13 on.
_gather_tensors = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
#: Fabric lets these win over its arguments without a word.
_OVERRIDES = ("LT_ACCELERATOR", "LT_STRATEGY", "LT_DEVICES", "LT_NUM_NODES", "LT_PRECISION")


class DreamWorld:
    """Ranks, device, precision and collectives of a run.

    Builds a `DreamFabric` from device parameters, or works with a ``Fabric`` given by
    the user, under any strategy; what is launched already is not launched again.

    Args:
        device_parameters: what to build; the default is everything ``"auto"``.
        fabric: an existing ``Fabric``; device parameters are then not looked at.

    Raises:
        ConfigError: the device parameters cannot work here.
    """

    def __init__(
        self,
        device_parameters: DeviceParameters | None = None,
        *,
        fabric: Fabric | None = None,
    ) -> None:
        had_group = fabric is not None or DEFAULT_GROUP.exists()
        if fabric is None:
            asked = device_parameters or DeviceParameters()
            arguments = fabric_arguments(asked)
            try:
                fabric = DreamFabric(**arguments)
            except (ValueError, RuntimeError, TypeError, ImportError) as error:
                raise refusal(asked, error) from error
        self._fabric = fabric
        # Under `fabric run` a Fabric joins the group when it is made.
        if not had_group and DEFAULT_GROUP.exists():
            DEFAULT_GROUP.use(self, is_opened=True)
        self._said_overrides = False
        self._children: Children | None = None
        parameters = device_parameters or DeviceParameters()
        timeout = timedelta(seconds=parameters.timeout_seconds)
        self._background_group, self._host_group = SideGroup(timeout), SideGroup(timeout)

    @classmethod
    def from_fabric(cls, fabric: Fabric) -> DreamWorld:
        """A world around an existing ``Fabric``."""
        return cls(fabric=fabric)

    # ------------------------------------------------------------------ what it is

    @property
    def fabric(self) -> Fabric:
        """The Fabric behind it."""
        return self._fabric

    @property
    def strategy(self) -> Strategy:
        """Fabric's strategy."""
        return self._fabric.strategy

    @property
    def precision(self) -> str:
        """The precision in Fabric's names, ``"bf16-mixed"`` for example."""
        strategy = self.strategy
        if isinstance(strategy, MeshStrategy):
            return strategy.precision_name
        return str(strategy.precision.precision)

    @property
    def scales_loss(self) -> bool:
        """Whether losses are scaled (``"16-mixed"``), and steps that overflow are skipped."""
        return getattr(self.strategy.precision, "scaler", None) is not None

    @property
    def rank(self) -> int:
        """Index of this process among all, from 0."""
        self._require_known("rank")
        return self._fabric.global_rank

    @property
    def size(self) -> int:
        """Number of processes."""
        self._require_known("size")
        return self._fabric.world_size

    @property
    def local_rank(self) -> int:
        """Index of this process on its machine."""
        self._require_known("local_rank")
        return self._fabric.local_rank

    @property
    def node_rank(self) -> int:
        """Index of this machine."""
        self._require_known("node_rank")
        return self._fabric.node_rank

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        self._require_known("device")
        return self._fabric.device

    @property
    def is_global_zero(self) -> bool:
        """Whether this is rank 0, the one that writes, draws and decides."""
        return self.rank == 0

    @property
    def mesh(self) -> DeviceMesh | None:
        """The named device mesh, if the strategy has one."""
        if not isinstance(self.strategy, ModelParallelStrategy):
            return None
        self._require_launched("mesh")
        return self.strategy.device_mesh

    @property
    def dp_size(self) -> int:
        """Number of data-parallel ranks: those that get different samples."""
        return self._data_parallel()[0]

    @property
    def dp_rank(self) -> int:
        """Index of this process among them."""
        return self._data_parallel()[1]

    @property
    def tp_size(self) -> int:
        """Number of ranks that share the same samples."""
        return self.size // self.dp_size

    @property
    def tp_rank(self) -> int:
        """Index of this process among them."""
        return self.rank % self.tp_size

    @property
    def callbacks(self) -> list[Any]:
        """Callbacks that are registered on the Fabric."""
        return list(self._fabric._callbacks)

    @property
    def loggers(self) -> list[Any]:
        """Loggers registered on the Fabric."""
        return list(self._fabric.loggers)

    @property
    def is_launched(self) -> bool:
        """Whether the processes of the run exist and know each other."""
        return bool(self._fabric._launched) or not isinstance(self.strategy, ParallelStrategy)

    # ------------------------------------------------------------------ life

    def launch(self) -> None:
        """Start the other processes and join the process group. Calling it again is harmless."""
        if self.starts_functions:
            raise RuntimeError(
                "this strategy forks or spawns its ranks with a function to run. Call "
                "trainer.fit(), or world.start(function)."
            )
        if not self._fabric._launched:
            had_group = DEFAULT_GROUP.exists()
            with fresh_store():
                self._fabric.launch()
            if DEFAULT_GROUP.exists():
                DEFAULT_GROUP.use(self, is_opened=not had_group)
            self._children = Children(self.strategy)
        if self.size > 1:
            let_threads_finish_at_exit()
        overrides = [f"{name}={os.environ[name]}" for name in _OVERRIDES if name in os.environ]
        if overrides and not self._said_overrides:
            self._said_overrides = True
            who = "fabric run" if os.environ.get("LT_CLI_USED") == "1" else "the environment"
            self.print(f"{who} overrides the device settings: {', '.join(overrides)}")

    def hold_children(self) -> None:
        """Keep processes that `launch` started from Fabric's observer, which kills everybody."""
        if self._children is not None:
            self._children.hold()

    def end_children(self) -> None:
        """They have a few seconds at the end of this process, which has failed."""
        if self._children is not None:
            self._children.are_to_end = True

    @property
    def starts_functions(self) -> bool:
        """Whether ranks are forked or spawned to run a function, as notebooks need."""
        return starts_functions(self.strategy) and not self._fabric._launched

    @property
    def spawns(self) -> bool:
        """Whether these ranks are fresh processes that everything must be sent to."""
        return self.starts_functions and spawns(self.strategy)

    def start(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Run a function on ranks that are forked or spawned for it, and wait for them.

        Ctrl-C reaches them all; they have half a minute to save.

        Args:
            function: called on each rank, with this world launched there.
            *arguments: for the function. Under ``"ddp_spawn"`` all of it must pickle.

        Raises:
            torch.multiprocessing.ProcessRaisedException: with the traceback of a rank that failed.
        """
        try:
            run_on_ranks(self._fabric, partial(_on_rank, self, function, arguments))
        finally:
            # Fabric counts this process as launched, which has no rank.
            self._fabric._launched = False

    def end_side_groups(self) -> None:
        """End the groups beside the default one. On every rank; they are made anew when needed."""
        self._background_group.end()
        self._host_group.end()

    def close(self) -> None:
        """Leave the process group, if `launch` joined it; the last one to leave ends it.

        Let go of models first: torch ends a group with Python's lock held when a DDP module is
        the last to use it, and can then wait for ever.
        """
        self.end_side_groups()
        DEFAULT_GROUP.leave(self)

    # ------------------------------------------------------------------ training

    def setup(
        self,
        module: nn.Module,
        *optimizers: Optimizer,
        parallelize: Parallelize | None = None,
        initialize: bool = True,
    ) -> Any:
        """Place a module on the device and wrap it for the strategy.

        Under ``MeshStrategy`` make the optimizer after this call, or hand it in here.

        Args:
            module: a module that was not set up before.
            *optimizers: its optimizers, if they exist already.
            parallelize: how ``MeshStrategy`` shards this module, instead of its default.
            initialize: initialise what was made on the meta device with the layers' own
                ``reset_parameters``; if False, call `initialize` afterwards.

        Returns:
            The wrapped module, or a tuple of it and the wrapped optimizers, as Fabric does.
        """
        return set_up(
            self._fabric, module, optimizers, self.device, parallelize, initialize=initialize
        )

    def initialize(
        self,
        modules: Mapping[str, nn.Module],
        layers: Iterable[nn.Module],
        init_weights: Callable[[], None],
    ) -> None:
        """Initialise modules that were made on the meta device, once they are set up.

        The values are, to the bit, those of one device with the generators of rank 0. A
        collective.

        Args:
            modules: by name, as they were made.
            layers: those to call ``reset_parameters`` of, before the other.
            init_weights: writes parameters and buffers in place.

        Raises:
            ConfigError: naming each parameter and buffer that is on meta or was never written.
        """
        if not isinstance(self.strategy, _PLAIN):
            raise ConfigError(
                "configure_models",
                [f"under {type(self.strategy).__name__} models cannot be made on the meta device"],
                "Use DDP or dp_shard, or make them on the CPU.",
            )
        initialize_modules(self.strategy, modules, layers, init_weights)

    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """Wrap an optimizer so that its step goes through strategy and precision."""
        if isinstance(optimizer, _FabricOptimizer):
            return optimizer
        return self._fabric.setup_optimizers(optimizer)  # type: ignore[return-value]

    def setup_dataloader(self, loader: Any) -> Any:
        """Fabric's own set-up of a torch ``DataLoader``; it keeps no position.

        `ResumableLoader` is what the trainers use.
        """
        return self._fabric.setup_dataloaders(loader)

    @property
    def moves_batches(self) -> bool:
        """Whether `to_device` has anything to do."""
        return self._fabric.device.type != "cpu"

    def to_device(self, batch: T) -> T:
        """Move the tensors of a batch to the device of this process."""
        if not self.moves_batches:
            return batch
        return self._fabric.to_device(batch)  # type: ignore[no-any-return]

    def synchronize(self) -> None:
        """Wait until all work that is queued on the device is done; nothing on a CPU."""
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize()

    def precision_context(self) -> AbstractContextManager[Any]:
        """What the precision puts around a forward pass, autocast for one."""
        return self.strategy.precision.forward_context()

    def to_precision(self, batch: T) -> T:
        """Floating-point tensors of a batch, as the precision feeds them to a forward pass."""
        return self.strategy.precision.convert_input(batch)  # type: ignore[no-any-return]

    def backward(self, loss: Tensor) -> None:
        """Backward pass through the precision plugin (loss scaling)."""
        self._fabric.backward(loss)

    def backward_function(self) -> Callable[[Tensor, float], None]:
        """What `backward` of a loss times a factor comes down to here, for every step."""
        is_own = type(self).backward is not DreamWorld.backward
        return backward_of(self._fabric, self.backward if is_own else self._fabric.backward)

    def accumulate(
        self, models: Iterable[nn.Module], enabled: bool
    ) -> AbstractContextManager[None]:
        """Keep gradients local in the block, for batches that do not end their window.

        Args:
            models: wrapped modules whose forward and backward run in the block.
            enabled: False does nothing, so gradients are synchronised as usual.
        """
        return no_gradient_sync(models) if enabled and self.is_parallel else _NOTHING

    @property
    def is_parallel(self) -> bool:
        """Whether gradients are synchronised between processes."""
        return isinstance(self.strategy, ParallelStrategy)

    def clip_gradients(
        self,
        optimizer: Optimizer,
        *,
        max_norm: float | None = None,
        clip_val: float | None = None,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
        module: nn.Module | None = None,
    ) -> Tensor:
        """Clip the gradients of an optimizer and measure them.

        Args:
            optimizer: whose gradients.
            max_norm: scale them down to this norm; None leaves them as they are.
            clip_val: cut each element to plus or minus this instead.
            norm_type: which norm.
            error_if_nonfinite: raise at a norm that is NaN or infinite; costs a host sync.
            module: the one that it trains, as `setup` returned it. FSDP1 asks it.

        Returns:
            The norm before clipping: a plain tensor without dimensions, on the device, the same
            on every rank.
        """
        raw: Optimizer = unwrap(optimizer)
        if not isinstance(self.strategy, _PLAIN):
            # It alone sees all parts of the gradients. An infinite norm leaves them as they are.
            owner = nn.Identity() if module is None else module
            limit = math.inf if max_norm is None else max_norm
            norm = self._fabric.clip_gradients(
                owner,
                raw,
                max_norm=limit,
                norm_type=norm_type,
                error_if_nonfinite=error_if_nonfinite,
            )
            if clip_val is not None:
                self._fabric.clip_gradients(owner, raw, clip_val=clip_val)
            assert norm is not None
            return unsharded_norm(norm)
        precision = self.strategy.precision
        if (scaler := getattr(precision, "scaler", None)) is not None:
            scaler.unscale_(raw)  # Fabric refuses fused optimizers, which torch can do
        else:
            precision.unscale_gradients(raw)
        grads = gradients([raw])
        norm = clip_to_norm(
            grads, max_norm, norm_type=norm_type, error_if_nonfinite=error_if_nonfinite
        )
        if clip_val is not None:
            for grad in grads:
                grad.clamp_(-clip_val, clip_val)
        return norm

    # ------------------------------------------------------------------ collectives

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self._fabric.barrier()

    def broadcast(self, value: T, src: int = 0) -> T:
        """The value of rank ``src``, on every rank. Any object that pickles."""
        return self._fabric.broadcast(value, src=src)

    def all_gather(self, data: Any) -> Any:
        """Tensors of every rank, stacked along a new first dimension (none on one process)."""
        if self.size == 1 or not isinstance(data, Tensor) or data.requires_grad:
            return self._fabric.all_gather(data)
        # Fabric's is differentiable, and has the ranks meet at a barrier before it.
        gathered = data.new_empty(self.size * data.numel())
        _gather_tensors(gathered, data.reshape(-1))
        return gathered.view(self.size, *data.shape)

    def all_reduce(self, data: Any, op: str = "mean") -> Any:
        """Tensors reduced over all ranks: ``"mean"``, ``"sum"``, ``"min"`` or ``"max"``."""
        if op in ("mean", "sum"):
            return self._fabric.all_reduce(data, reduce_op=op)
        if self.size == 1:
            return data
        reduced = data.clone()
        dist.all_reduce(reduced, op={"min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX}[op])
        return reduced

    def all_gather_object(self, value: T) -> list[T]:
        """The value of every rank, in rank order. Any object that pickles."""
        return self.ranks.gather(value)

    def gather_data_parallel(self, value: T) -> list[T]:
        """The values of the ranks that have different samples, in the order of ``dp_rank``.

        Of ranks that share samples (tensor parallel) one counts, or a sum would count them twice.
        """
        return self.all_gather_object(value)[:: self.tp_size]

    @property
    def ranks(self) -> Ranks:
        """All ranks, for what works on files."""
        return Ranks(self.rank, self.size)

    def background_ranks(self) -> Ranks:
        """All ranks, with a process group for collectives beside the training.

        Collectives of two threads on one group would meet each other's. The first call makes it,
        a collective; on the CPU, where a writer's collectives take no turn on an accelerator.
        """
        group = self._background_group.open() if self.size > 1 else None
        return Ranks(self.rank, self.size, group)

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` holds on any rank. One small collective."""
        if self.size == 1:
            return flag
        # On an accelerator's own group, the answer would wait for all work that is queued.
        group = None if self.device.type == "cpu" else self._host_group.open()
        tensor = torch.tensor(int(flag))
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=group)
        return bool(tensor.item())

    # ------------------------------------------------------------------ state and files

    def precision_state(self) -> dict[str, Any]:
        """State of the precision plugin: the loss scale under ``"16-mixed"``, else nothing."""
        return dict(self.strategy.precision.state_dict())

    def load_precision_state(self, state: Mapping[str, Any]) -> None:
        """The inverse of `precision_state`."""
        if state:
            self.strategy.precision.load_state_dict(dict(state))

    def save(self, path: str | Path, state: Tree) -> None:
        """Write a tree of plain data and tensors as a checkpoint directory, whole or not at all.

        Raises:
            TypeError: something is neither plain data nor a tensor; the message names it.
            CheckpointError: writing failed on some rank.
        """
        entries = flatten(state, {}, rank=self.rank)
        save_directory(Path(path), entries, self.ranks, step=0, epoch=0)

    def load(self, path: str | Path, state: Tree | None = None) -> Tree:
        """Read a checkpoint directory as plain data and tensors; nothing is applied.

        Args:
            path: what `save` wrote.
            state: a tree whose tensors say which ones come back sharded, and how.

        Raises:
            CheckpointError: it cannot be read.
        """
        templates = dict(tensor_leaves(state))
        shared, _ = read_tree(Path(path), lambda name, size: templates.get(name), rank=self.rank)
        return shared

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print on rank 0 only."""
        if self.is_global_zero:
            # A killed run must not take its last words with it in a buffer.
            print(*args, **{"flush": True, **kwargs})

    # ------------------------------------------------------------------ inside

    def _data_parallel(self) -> tuple[int, int]:
        strategy = self.strategy
        if isinstance(strategy, ModelParallelStrategy):
            # How ranks are laid out is known with the mesh, not with the environment.
            self._require_launched("dp_size")
        if isinstance(strategy, MeshStrategy):
            return strategy.dp_size, strategy.dp_rank
        if isinstance(strategy, ModelParallelStrategy):
            mesh = strategy.device_mesh["data_parallel"]
            return mesh.size(), mesh.get_local_rank()
        return self.size, self.rank

    def _require_known(self, what: str) -> None:
        if self.is_launched:
            return
        environment = getattr(self.strategy, "cluster_environment", None)
        if environment is None or isinstance(environment, LightningEnvironment):
            # Fabric would answer 0 of 1 here, on every rank.
            self._require_launched(what)

    def _require_launched(self, what: str) -> None:
        if not self.is_launched:
            raise RuntimeError(
                f"world.{what} is not known before the processes are started. "
                "Call world.launch() first."
            )


def _on_rank(
    world: DreamWorld, function: Callable[..., Any], arguments: tuple[Any, ...], _: Fabric
) -> None:
    """What a started rank does. It returns nothing: Fabric's queue for it blocks when full."""
    if DEFAULT_GROUP.exists():
        DEFAULT_GROUP.use(world, is_opened=True)
    function(*arguments)


__all__ = ["DreamWorld"]
