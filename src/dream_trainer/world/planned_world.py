"""One rank of a world that does not exist: everything is set up, nothing is started."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning.fabric.accelerators import CPUAccelerator
from lightning.fabric.plugins.environments import ClusterEnvironment
from lightning.fabric.plugins.precision import MixedPrecision
from lightning.fabric.strategies import STRATEGY_REGISTRY, DDPStrategy, Strategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer

from dream_trainer.configs import DeviceParameters
from dream_trainer.errors import ConfigError
from dream_trainer.storage import Ranks
from dream_trainer.world.component_state import clean_name
from dream_trainer.world.dream_fabric import DreamFabric
from dream_trainer.world.dream_world import DreamWorld
from dream_trainer.world.mesh_strategy import TP, MeshStrategy, Parallelize

T = TypeVar("T")
#: Above the ranks of every real run.
_NO_REAL_RANK = 1 << 16
_plans = itertools.count()


class PlannedWorld(DreamWorld):
    """Rank 0 of a world of any size, in one process; modules are laid out as in a real run.

    Modules stay on the device they were made on, the meta device usually. Meshes exist over torch's
    fake process group, whose collectives do nothing and which opens no port. It is a private part
    of torch (``torch.testing._internal``). Call `close` when done.

    Args:
        parameters: resolved for ``size`` ranks.
        size: ranks of the world.
        device: what `device` answers.

    Attributes:
        problems: policies that refused a module; `setup` collects them and goes on.

    Raises:
        ConfigError: the precision is not available here.
        RuntimeError: this process is in a process group already.
    """

    def __init__(
        self, parameters: DeviceParameters, size: int, device: torch.device | str = "meta"
    ) -> None:
        precision: dict[str, Any] = {"precision": parameters.precision}
        if parameters.precision.endswith("16-mixed"):
            # On CPU there is no float16 autocast; bfloat16 is as large.
            precision = {"plugins": MixedPrecision("bf16-mixed", "cpu")}
        try:
            fabric = DreamFabric(accelerator="cpu", devices=1, **precision)
        except (ValueError, ImportError, RuntimeError) as error:
            raise ConfigError("device_parameters", [str(error)]) from error
        super().__init__(parameters, fabric=fabric)
        self.problems: list[ConfigError] = []
        self._size, self._device = size, torch.device(device)
        self._mesh_strategy = None
        if parameters.layout == "mesh":
            self._mesh_strategy = _laid_out(parameters, size, fabric.strategy)

    # ------------------------------------------------------------------ what it is

    @property
    def strategy(self) -> Strategy:
        """The strategy of the run; Fabric's single-device one in place of DDP."""
        return self._mesh_strategy or super().strategy

    @property
    def rank(self) -> int:
        return 0

    @property
    def size(self) -> int:
        return self._size

    @property
    def local_rank(self) -> int:
        return 0

    @property
    def node_rank(self) -> int:
        return 0

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def mesh(self) -> DeviceMesh | None:
        return self._mesh_strategy.device_mesh if self._mesh_strategy else None

    @property
    def is_launched(self) -> bool:
        return True

    @property
    def is_parallel(self) -> bool:
        return self._size > 1

    @property
    def ranks(self) -> Ranks:
        return Ranks()

    # ------------------------------------------------------------------ life

    def launch(self) -> None:
        """Nothing: there is nothing to start."""

    def close(self) -> None:
        """Leave the fake process group, if there is one."""
        if self._mesh_strategy is not None and dist.is_initialized():
            dist.destroy_process_group()

    def setup(
        self,
        module: nn.Module,
        *optimizers: Optimizer,
        parallelize: Parallelize | None = None,
        initialize: bool = True,
    ) -> Any:
        """Lay a module out as the strategy would, where it is.

        Returns:
            The module itself, or a tuple of it and the optimizers.
        """
        module = super().strategy.precision.convert_module(module)
        if (strategy := self._mesh_strategy) is not None:
            try:
                module = (parallelize or strategy.parallelize)(module, strategy)
            except ConfigError as error:
                self.problems.append(error)
            except Exception:
                # Layers that do not divide are why torch gave up, and are named by the caller.
                if uneven_splits("", module) is None:
                    raise
        return (module, *optimizers) if optimizers else module

    def initialize(
        self,
        modules: Mapping[str, nn.Module],
        layers: Iterable[nn.Module],
        init_weights: Callable[[], None],
    ) -> None:
        """Nothing: values are not planned."""

    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """The optimizer itself."""
        return optimizer

    def setup_dataloader(self, loader: Any) -> Any:
        """The loader itself."""
        return loader

    def to_device(self, batch: T) -> T:
        """The batch itself."""
        return batch

    # ------------------------------------------------------------------ collectives

    def barrier(self) -> None:
        """Nothing."""

    def broadcast(self, value: T, src: int = 0) -> T:
        """The value."""
        return value

    def all_reduce(self, data: Any, op: str = "mean") -> Any:
        """The data, as if all ranks had the same."""
        return data

    def all_gather_object(self, value: T) -> list[T]:
        """The value of this rank alone."""
        return [value]

    def any(self, flag: bool) -> bool:
        """The flag, as if all ranks had the same."""
        return flag

    def _data_parallel(self) -> tuple[int, int]:
        return (self._mesh_strategy.dp_size if self._mesh_strategy else self._size), 0


def known_layout(parameters: DeviceParameters) -> DeviceParameters:
    """Parameters whose layout the sizes tell: Fabric's DDP by name becomes ``dp_replicate``.

    Raises:
        ConfigError: a strategy that divides models in its own way, or no strategy at all.
    """
    strategy = parameters.strategy
    if strategy is None:
        return parameters
    names = sorted(STRATEGY_REGISTRY.available_strategies())
    is_ddp = isinstance(strategy, DDPStrategy) or (
        isinstance(strategy, str) and strategy.startswith("ddp") and strategy in names
    )
    if is_ddp or strategy == "auto":
        return replace(parameters, strategy=None)
    if isinstance(strategy, str) and strategy not in names:
        raise ConfigError(
            "device_parameters",
            [f"strategy={strategy!r} is none of Fabric's: {', '.join(names)}"],
            "Leave it out and set dp_replicate, dp_shard or tensor_parallel.",
        )
    raise ConfigError(
        "device_parameters",
        [f"strategy={strategy!r} divides models in a way that only a running one knows"],
        "Plan with dp_replicate, dp_shard and tensor_parallel instead, or with a DDP strategy.",
    )


def uneven_splits(model_name: str, module: nn.Module) -> ConfigError | None:
    """The parameters that tensor parallel splits into unequal parts, if there are any."""
    found = []
    for name, parameter in module.named_parameters():
        if not isinstance(parameter, DTensor):
            continue
        names = parameter.device_mesh.mesh_dim_names or ()
        if TP not in names:
            continue
        size = parameter.device_mesh.size(names.index(TP))
        placement = parameter.placements[names.index(TP)]
        if isinstance(placement, Shard) and parameter.shape[placement.dim] % size:
            found.append(
                f"{model_name}.{clean_name(name)} of shape {tuple(parameter.shape)}: "
                f"tensor_parallel={size} does not divide dimension {placement.dim}"
            )
    if not found:
        return None
    more = [f"and {len(found) - 3} more parameters"] if len(found) > 3 else []
    return ConfigError(
        "apply_tensor_parallel",
        [*found[:3], *more],
        "Change these sizes, or tensor_parallel, or what is split.",
    )


def _laid_out(parameters: DeviceParameters, size: int, single: Strategy) -> MeshStrategy:
    """The strategy of a run of ``size`` ranks, with its mesh, as rank 0."""
    # Here, because it registers a backend, which only planning needs.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise RuntimeError(
            "this process is in a process group already; plan in a process that trains nothing"
        )
    # torch keeps what it worked out for a mesh, and takes a mesh of the same ranks for the same
    # one: with ranks of their own, planned meshes leave nothing behind for real ones.
    first = _NO_REAL_RANK + next(_plans) * size
    strategy = _PlannedStrategy(
        dp_replicate=parameters.dp_replicate,
        dp_shard=parameters.dp_shard,
        tensor_parallel=parameters.tensor_parallel,
        cpu_offload=parameters.cpu_offload,
    )
    strategy.accelerator = CPUAccelerator()
    strategy.parallel_devices = [torch.device("cpu")]
    strategy.cluster_environment = _PlannedEnvironment(size)
    strategy.precision = single.precision
    strategy.first = first
    dist.init_process_group("fake", store=FakeStore(), rank=first, world_size=first + size)
    try:
        strategy.setup_environment()  # its launch finds a process group and makes none
    except BaseException:
        dist.destroy_process_group()
        raise
    return strategy


class _PlannedStrategy(MeshStrategy):
    """Its mesh begins with another rank than 0."""

    first = 0

    def make_mesh(self, dimensions: Mapping[str, int]) -> DeviceMesh:
        ranks = torch.arange(self.first, self.first + self.world_size)
        mesh = ranks.view(tuple(dimensions.values()))
        return DeviceMesh(self.root_device.type, mesh, mesh_dim_names=tuple(dimensions))


class _PlannedEnvironment(ClusterEnvironment):
    """Tells that this is rank 0 of so many."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self._size = size

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        return "nowhere"

    @property
    def main_port(self) -> int:
        return 0

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return self._size

    def set_world_size(self, size: int) -> None:
        """It is fixed; Fabric counts the devices of this machine."""

    def global_rank(self) -> int:
        return 0

    def set_global_rank(self, rank: int) -> None:
        """It is fixed."""

    def local_rank(self) -> int:
        return 0

    def node_rank(self) -> int:
        return 0
