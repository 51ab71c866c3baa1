"""Every strategy that Fabric has, by name and as an instance: it runs, or says what does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.fabric.strategies import (
    STRATEGY_REGISTRY,
    DDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from support import TinyTrainer, flat, run_ranks, tiny
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from dream_trainer.configs import DeviceParameters
from dream_trainer.errors import ConfigError
from dream_trainer.world import DreamWorld, MeshStrategy

pytestmark = [pytest.mark.distributed, pytest.mark.may_leave("rng")]

#: Name -> ranks on which it trains here.
TRAINS = {"auto": 2, "ddp": 2, "ddp_find_unused_parameters_true": 2, "dp": 1}
#: They start the processes from a function; launching is tested with the launchers.
LAUNCHERS = {"ddp_spawn", "ddp_fork", "ddp_notebook"}
#: Name starts with -> what the first and the second line say.
REFUSED = {
    "fsdp": ("FSDP1 needs a GPU", "dp_shard"),
    "deepspeed": ("it needs the package deepspeed and a GPU", "dp_shard"),
    "xla": ("it needs torch_xla and a TPU", "Leave strategy out"),
    "single_": ("it needs torch_xla and a TPU", "Leave strategy out"),
}


def fit(root: Path, size: int, strategy: Any = None, **options: Any) -> list[Any]:
    def rank() -> Any:
        torch.set_default_dtype(torch.float64)
        # An instance belongs to one Fabric, so it is made in its process.
        made = strategy() if callable(strategy) else strategy
        trainer = tiny(
            root,
            devices=size,
            strategy=made,
            **{"batch_size": 4 // size, "num_samples": 22, "gradient_clip_val": 0.3} | options,
        )
        trainer.fit()
        whole = {
            name: value.full_tensor() if isinstance(value, DTensor) else value
            for name, value in trainer.state_dict()["models"]["net"].items()
        }
        return {name: value.tolist() for name, value in whole.items()}

    return run_ranks(size, rank)


@pytest.fixture(scope="module")
def one_device(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    (weights,) = fit(tmp_path_factory.mktemp("single"), 1, gradient_accumulation_steps=2)
    return weights


def assert_same(ranks: list[Any], expected: dict[str, Any], rtol: float = 1e-10) -> None:
    for weights in ranks:
        assert weights.keys() == expected.keys()
        for name, value in weights.items():
            a, b = torch.tensor(value), torch.tensor(expected[name])
            torch.testing.assert_close(a, b, rtol=rtol, atol=rtol)


def test_every_name_in_fabrics_registry_has_its_place_here() -> None:
    names = {"auto", *STRATEGY_REGISTRY}
    assert names >= TRAINS.keys() | LAUNCHERS
    rest = names - TRAINS.keys() - LAUNCHERS
    assert {name for name in rest if not name.startswith(tuple(REFUSED))} == set()


@pytest.mark.parametrize("name", TRAINS)
def test_a_name_trains(tmp_path: Path, name: str, one_device: dict[str, Any]) -> None:
    ranks = fit(tmp_path, TRAINS[name], name, gradient_accumulation_steps=2)
    assert_same(ranks, one_device)


@pytest.mark.parametrize("name", sorted(LAUNCHERS))
def test_a_launcher_is_passed_through(name: str) -> None:
    strategy = DreamWorld(DeviceParameters(accelerator="cpu", devices=2, strategy=name)).strategy
    assert isinstance(strategy, DDPStrategy)


@pytest.mark.parametrize(
    "name", sorted(n for n in STRATEGY_REGISTRY if n.startswith(tuple(REFUSED)))
)
def test_what_cannot_run_here_is_two_lines_that_say_what_can(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        DreamWorld(DeviceParameters(accelerator="cpu", devices=2, strategy=name))
    first, second = str(caught.value).splitlines()
    why, instead = next(lines for start, lines in REFUSED.items() if name.startswith(start))
    assert first == f"device_parameters: strategy={name!r}: {why}"
    assert instead in second


def test_a_name_that_does_not_exist_is_answered_with_those_that_do() -> None:
    with pytest.raises(ConfigError) as caught:
        DreamWorld(DeviceParameters(accelerator="cpu", strategy="fsdp3"))
    first, second = str(caught.value).splitlines()
    assert first == "device_parameters: Fabric has no strategy='fsdp3'; did you mean 'fsdp'?"
    assert "ddp_find_unused_parameters_true" in second


def test_numbered_cpu_ranks_are_answered_with_their_number() -> None:
    with pytest.raises(ConfigError, match=r"CPU ranks are not numbered: devices=2\.$"):
        DreamWorld(DeviceParameters(accelerator="cpu", devices=[0, 1]))


INSTANCES: dict[str, Any] = {
    "find_unused": lambda: DDPStrategy(find_unused_parameters=True),
    "static_graph": lambda: DDPStrategy(static_graph=True),
    "bucket_view": lambda: DDPStrategy(gradient_as_bucket_view=True, broadcast_buffers=False),
    "mesh": lambda: MeshStrategy(dp_shard=2),
}


@pytest.mark.parametrize("name", INSTANCES)
def test_an_instance_trains(tmp_path: Path, name: str, one_device: dict[str, Any]) -> None:
    # A static graph counts backward passes, so torch rules accumulation out with it.
    size = 1 if name == "static_graph" else 2
    batch = {"batch_size": 4} if name == "static_graph" else {}
    ranks = fit(tmp_path, 2, INSTANCES[name], gradient_accumulation_steps=size, **batch)
    assert_same(ranks, one_device)


def test_accumulation_with_a_static_graph_is_refused(tmp_path: Path) -> None:
    def rank() -> str:
        strategy = DDPStrategy(static_graph=True)
        options: dict[str, Any] = {"devices": 2, "gradient_accumulation_steps": 2}
        with pytest.raises(ConfigError) as caught:
            tiny(tmp_path, strategy=strategy, enable=False, **options).fit()
        return str(caught.value)

    for text in run_ranks(2, rank):
        assert "static_graph" in text
        assert text.count("\n") == 1


def stock() -> ModelParallelStrategy:
    def parallelize(module: nn.Module, mesh: Any) -> nn.Module:
        for layer in (module[0], module):
            fully_shard(layer, mesh=mesh["data_parallel"])
        return module

    return ModelParallelStrategy(parallelize, data_parallel_size=2, tensor_parallel_size=1)


def test_fabrics_own_model_parallel_strategy_trains_and_resumes(
    tmp_path: Path, one_device: dict[str, Any]
) -> None:
    options = {"gradient_accumulation_steps": 2, "experiment": "stock"}
    fit(tmp_path, 2, stock, max_steps=4, **options)
    resumed = fit(tmp_path, 2, stock, **options)
    assert_same(resumed, one_device)
    # What it saved loads on one device, too.
    ((continued),) = fit(tmp_path, 1, **options)
    assert_same([continued], one_device)


class Hooked(TinyTrainer):
    """Reduces gradients with a hook of its own; unfreezes a layer in the second epoch."""

    def setup(self) -> None:
        super().setup()
        self.reduced: list[int] = []
        (ddp,) = (m for m in self.net.modules() if isinstance(m, DistributedDataParallel))
        ddp.register_comm_hook(self.reduced, _count_and_reduce)

    def configure_models(self) -> None:
        super().configure_models()
        self.net[0].requires_grad_(False)

    def compute_loss(self, batch: Any, batch_idx: int) -> Any:
        if self.current_epoch == 1:
            self.named_models()["net"][0].requires_grad_(True)
        return super().compute_loss(batch, batch_idx)


def _count_and_reduce(state, bucket):  # type: ignore[no-untyped-def]  # torch compares the annotations
    state.append(len(bucket.parameters()))
    return allreduce_hook(dist.group.WORLD, bucket)


def test_a_communication_hook_of_ddp_outlives_unfreezing(tmp_path: Path) -> None:
    def rank() -> Any:
        trainer = tiny(tmp_path, Hooked, devices=2, batch_size=2, num_samples=8, enable=False)
        trainer.fit()
        return trainer.reduced, flat(trainer.state_dict()["models"]["net"])

    one, other = run_ranks(2, rank)
    assert one == other
    assert one[0][:2] == [2, 2]
    assert one[0][-2:] == [4, 4]


def test_devices_accelerator_nodes_and_precision_go_along() -> None:
    parameters = DeviceParameters(
        accelerator="cpu", devices=3, num_nodes=2, strategy="ddp", precision="bf16-true"
    )
    world = DreamWorld(parameters)
    strategy = world.strategy
    assert isinstance(strategy, DDPStrategy)
    assert (strategy.num_processes, strategy.num_nodes) == (3, 2)
    assert world.precision == "bf16-true"
    assert strategy.root_device == torch.device("cpu")
    one = DreamWorld(DeviceParameters(accelerator="cpu", devices=1, strategy="auto"))
    assert isinstance(one.strategy, SingleDeviceStrategy)
