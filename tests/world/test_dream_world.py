"""DreamWorld: what it knows and when, its collectives, its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy, SingleDeviceStrategy
from support import TinyTrainer, rank_environment, run_ranks, tiny
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dream_trainer.configs import DeviceParameters
from dream_trainer.errors import CheckpointError, ConfigError
from dream_trainer.world import DreamFabric, DreamWorld, MeshStrategy
from dream_trainer.world.wrappers import unwrap

# These tests draw, and seed, on their own.
pytestmark = pytest.mark.may_leave("rng")

RANKS = ("rank", "size", "local_rank", "node_rank", "device", "is_global_zero")
PARALLEL = ("dp_rank", "dp_size", "tp_rank", "tp_size")


def cpu(**options: Any) -> DeviceParameters:
    return DeviceParameters(accelerator="cpu", **options)


# ---------------------------------------------------------------------- what is known when


def test_one_process_knows_everything_without_launch() -> None:
    world = DreamWorld(cpu())
    assert [getattr(world, name) for name in RANKS] == [0, 1, 0, 0, torch.device("cpu"), True]
    assert [getattr(world, name) for name in PARALLEL] == [0, 1, 0, 1]
    assert (world.mesh, world.precision) == (None, "32-true")
    assert isinstance(world.strategy, SingleDeviceStrategy)
    assert isinstance(world.fabric, DreamFabric)
    assert world.is_launched
    assert not world.is_parallel


@pytest.mark.parametrize("options", [{}, {"dp_replicate": 1, "dp_shard": 2}])
@pytest.mark.parametrize("name", [*RANKS, *PARALLEL])
def test_asking_before_the_launcher_has_started_the_others_is_an_error(
    name: str, options: dict[str, Any]
) -> None:
    world = DreamWorld(cpu(devices=2, **options))
    with pytest.raises(RuntimeError, match=r"world\.\w+ is not known .* Call world.launch\(\)"):
        getattr(world, name)
    assert not world.is_launched


def test_a_mesh_is_not_known_before_launch() -> None:
    with pytest.raises(RuntimeError, match=r"world.mesh is not known"):
        _ = DreamWorld(cpu(devices=2, dp_replicate=1, dp_shard=2)).mesh


def test_under_torchrun_the_environment_answers_before_launch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in rank_environment(1, 2, 1).items():
        monkeypatch.setenv(name, value)
    world = DreamWorld(cpu())
    assert not world.fabric._launched
    assert [getattr(world, name) for name in RANKS] == [1, 2, 1, 0, torch.device("cpu"), False]
    assert [getattr(world, name) for name in PARALLEL] == [1, 2, 0, 1]


def test_sizes_that_cannot_work_are_refused_when_the_world_is_made() -> None:
    with pytest.raises(ConfigError, match=r"dp_replicate=2 .* does not make a world of 1 rank"):
        DreamWorld(cpu(dp_replicate=2))


@pytest.mark.distributed
def test_ranks_are_the_same_early_and_late() -> None:
    def rank(options: dict[str, Any]) -> Any:
        world = DreamWorld(cpu(**options))
        early = [getattr(world, name) for name in RANKS]
        world.launch()
        world.launch()  # harmless
        late = [getattr(world, name) for name in RANKS]
        parallel = [getattr(world, name) for name in PARALLEL]
        mesh = None if world.mesh is None else (world.mesh.mesh_dim_names, world.mesh.shape)
        world.close()
        return early == late, late + parallel, mesh, dist.is_initialized()

    zero, one = ([i, 2, i, 0, torch.device("cpu"), i == 0] for i in range(2))
    for options, names in [
        ({}, None),
        ({"dp_replicate": 1, "dp_shard": "auto"}, (("dp_shard",), (2,))),
        ({"dp_replicate": 1, "dp_shard": 1, "tensor_parallel": 2}, (("tp",), (2,))),
    ]:
        parallel = [[0, 1, i, 2] if "tensor_parallel" in options else [i, 2, 0, 1] for i in (0, 1)]
        expected = [(True, r + p, names, False) for r, p in zip((zero, one), parallel, strict=True)]
        assert run_ranks(2, rank, options) == expected


@pytest.mark.distributed
def test_hybrid_sharding_has_a_mesh_of_two_named_dimensions() -> None:
    def rank() -> Any:
        world = DreamWorld(cpu(dp_replicate=2, dp_shard=2))
        world.launch()
        model = world.setup(nn.Linear(4, 4))
        loss = model(torch.full((1, 4), float(world.rank))).sum()
        world.backward(loss)
        grad = unwrap(model).weight.grad.full_tensor()
        return world.mesh.mesh_dim_names, tuple(world.mesh.shape), float(grad.mean())

    # The gradient is the mean over all four ranks: (0 + 1 + 2 + 3) / 4.
    assert run_ranks(4, rank) == [(("dp_replicate", "dp_shard"), (2, 2), 1.5)] * 4


# ---------------------------------------------------------------------- a given Fabric


def test_a_given_fabric_is_not_looked_at_twice() -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    world = DreamWorld.from_fabric(fabric)
    assert world.fabric is fabric
    assert world.strategy is fabric.strategy
    ignored = DreamWorld(cpu(devices=2), fabric=fabric)
    assert ignored.size == 1


@pytest.mark.distributed
def test_a_launched_fabric_is_not_launched_again_and_its_group_is_left_alone() -> None:
    def rank() -> Any:
        fabric = Fabric(accelerator="cpu", devices=2, strategy=DDPStrategy())
        fabric.launch()
        world = DreamWorld.from_fabric(fabric)
        world.launch()
        world.close()
        return world.rank, dist.is_initialized()

    assert run_ranks(2, rank) == [(0, True), (1, True)]


# ---------------------------------------------------------------------- collectives


def collectives(**options: Any) -> dict[str, Any]:
    world = DreamWorld(cpu(**options))
    world.launch()
    mine = torch.tensor([float(world.rank + 1)])
    world.barrier()
    world.print("once")
    return {
        "broadcast": world.broadcast({"rank": world.rank}),
        "broadcast from the last": world.broadcast(world.rank, src=world.size - 1),
        "gather": world.all_gather(mine).flatten().tolist(),
        "objects": world.all_gather_object((world.rank, "x")),
        "mean": world.all_reduce(mine.clone()).item(),
        "sum": world.all_reduce(mine.clone(), op="sum").item(),
        "min": world.all_reduce(mine, op="min").item(),
        "max": world.all_reduce(mine, op="max").item(),
        "any": (world.any(world.rank == 0), world.any(False)),
        "mine": mine.item(),
    }


def test_collectives_of_one_process_need_no_others(capsys: pytest.CaptureFixture[str]) -> None:
    assert collectives() == {
        "broadcast": {"rank": 0},
        "broadcast from the last": 0,
        "gather": [1.0],
        "objects": [(0, "x")],
        "mean": 1.0,
        "sum": 1.0,
        "min": 1.0,
        "max": 1.0,
        "any": (True, False),
        "mine": 1.0,
    }
    assert capsys.readouterr().out == "once\n"


@pytest.mark.distributed
def test_collectives_of_two_ranks(capfd: pytest.CaptureFixture[str]) -> None:
    first, second = run_ranks(2, collectives)
    assert (first.pop("mine"), second.pop("mine")) == (1.0, 2.0)
    assert first == second
    assert first == {
        "broadcast": {"rank": 0},
        "broadcast from the last": 1,
        "gather": [1.0, 2.0],
        "objects": [(0, "x"), (1, "x")],
        "mean": 1.5,
        "sum": 3.0,
        "min": 1.0,
        "max": 2.0,
        "any": (True, False),
    }
    assert capfd.readouterr().out == "once\n"


# ---------------------------------------------------------------------- training


def test_clipping_returns_a_plain_norm_and_clips() -> None:
    world = DreamWorld(cpu())
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = world.setup_optimizer(torch.optim.SGD([parameter], lr=1.0))
    assert world.setup_optimizer(optimizer) is optimizer

    def norm(**options: Any) -> tuple[float, list[float]]:
        parameter.grad = torch.tensor([3.0, -4.0])
        found = world.clip_gradients(optimizer, **options)
        assert (type(found), found.ndim) == (Tensor, 0)
        return found.item(), parameter.grad.tolist()

    assert norm() == (5.0, [3.0, -4.0])
    assert norm(clip_val=3.5) == (5.0, [3.0, -3.5])
    assert norm(norm_type=1.0) == (7.0, [3.0, -4.0])
    assert norm(max_norm=10.0) == (5.0, [3.0, -4.0])
    value, clipped = norm(max_norm=1.0)
    assert value == 5.0
    assert clipped == pytest.approx([0.6, -0.8], rel=1e-5)
    parameter.grad = torch.tensor([float("nan"), 0.0])
    assert world.clip_gradients(optimizer, max_norm=1.0).isnan()
    with pytest.raises(RuntimeError, match="non-finite"):
        world.clip_gradients(optimizer, max_norm=1.0, error_if_nonfinite=True)


class KnowsMore(SingleDeviceStrategy):
    """As FSDP1, it asks the wrapped module for the norm: what is in ``.grad`` is a part of it."""

    def clip_gradients_norm(self, module: Any, optimizer: Any, **options: Any) -> Tensor:
        assert module.bias.grad is not None
        norm = super().clip_gradients_norm(module, optimizer, **options)
        return 2 * norm


@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_a_strategy_of_its_own_kind_measures_the_norm_itself(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, max_norm: float | None
) -> None:
    monkeypatch.setattr("dream_trainer.world.dream_world._PLAIN", ())
    norms: list[float] = []

    class Trainer(TinyTrainer):
        def configure_models(self) -> None:
            self.net = nn.Linear(3, 1)

        def step(self, *arguments: Any) -> Any:
            own = torch.nn.utils.get_total_norm([p.grad for p in self.net.parameters()])
            norm = super().step(*arguments)
            norms.append(float(norm / own))
            return norm

    strategy = KnowsMore("cpu")
    options = {"track_grad_norm": True, "gradient_clip_val": max_norm, "max_steps": 2}
    tiny(tmp_path, Trainer, strategy=strategy, enable=False, **options).fit()
    assert norms == [2.0, 2.0]


@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_the_norm_of_no_gradients_is_zero(max_norm: float | None) -> None:
    world = DreamWorld(cpu())
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=1.0)
    norm = world.clip_gradients(optimizer, max_norm=max_norm)
    assert (type(norm), norm.ndim, norm.item()) == (Tensor, 0, 0.0)


def test_unwrap_gives_the_users_own_objects() -> None:
    world = DreamWorld(cpu())
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters())
    wrapped_model, wrapped_optimizer = world.setup(model, optimizer)
    assert (wrapped_model is model, wrapped_optimizer is optimizer) == (False, False)
    assert (unwrap(wrapped_model) is model, unwrap(wrapped_optimizer) is optimizer) == (True, True)
    assert unwrap(model) is model


# ---------------------------------------------------------------------- files


def test_a_tree_of_plain_data_and_tensors_round_trips(tmp_path: Path) -> None:
    world = DreamWorld(cpu())
    tree = {
        "tensor": torch.arange(6, dtype=torch.float64).reshape(2, 3),
        "empty": torch.zeros(0, 3),
        "nested": [{"a": (1, 2.5, None, "x", b"y", True)}, torch.tensor(3, dtype=torch.int8)],
    }
    world.save(tmp_path / "tree", tree)
    loaded = world.load(tmp_path / "tree")
    assert torch.equal(loaded["tensor"], tree["tensor"])
    assert loaded["tensor"].dtype is torch.float64
    assert loaded["empty"].shape == (0, 3)
    assert loaded["nested"][0] == tree["nested"][0]
    assert torch.equal(loaded["nested"][1], tree["nested"][1])
    assert [path.name for path in tmp_path.iterdir()] == ["tree"]


def test_what_cannot_be_loaded_safely_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises((TypeError, CheckpointError), match=r"a\.b is a pathlib\."):
        DreamWorld(cpu()).save(tmp_path / "tree", {"a": {"b": tmp_path}})
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_is_none_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing-here"):
        DreamWorld(cpu()).load(tmp_path / "nothing-here")


@pytest.mark.distributed
def test_sharded_tensors_are_saved_once_and_come_back_as_asked(tmp_path: Path) -> None:
    def rank() -> Any:
        world = DreamWorld(cpu(dp_replicate=1, dp_shard=2))
        world.launch()
        torch.manual_seed(3)
        model = unwrap(world.setup(nn.Linear(4, 6)))
        world.save(tmp_path / "tree", {"weight": model.weight, "step": 3})
        plain = world.load(tmp_path / "tree")
        sharded = world.load(tmp_path / "tree", {"weight": model.weight.detach()})
        return (
            type(plain["weight"]) is Tensor,
            isinstance(sharded["weight"], DTensor),
            torch.equal(sharded["weight"].full_tensor(), plain["weight"]),
            torch.equal(model.weight.full_tensor(), plain["weight"]),
            plain["step"],
        )

    assert run_ranks(2, rank) == [(True, True, True, True, 3)] * 2


# ---------------------------------------------------------------------- strategies


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({}, SingleDeviceStrategy),
        ({"devices": 2}, DDPStrategy),
        ({"devices": 2, "dp_replicate": 1, "dp_shard": 2}, MeshStrategy),
        ({"devices": 2, "strategy": "ddp_find_unused_parameters_true"}, DDPStrategy),
    ],
)
def test_the_sizes_choose_the_strategy(options: dict[str, Any], kind: type) -> None:
    assert type(DreamWorld(cpu(**options)).strategy) is kind


def test_sharding_over_one_process_works_like_a_single_device() -> None:
    def rank() -> tuple[int, bool]:
        world = DreamWorld(cpu(dp_replicate=1, dp_shard="auto"))
        world.launch()
        model = world.setup(nn.Linear(2, 2))
        world.backward(model(torch.ones(1, 2)).sum())
        return world.dp_size, unwrap(model).weight.grad is not None

    assert run_ranks(1, rank) == [(1, True)]


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-true", "bf16-mixed"])
def test_precision_is_told_in_fabrics_names(precision: str) -> None:
    assert DreamWorld(cpu(precision=precision)).precision == precision


def test_precision_of_a_mesh_is_told_in_fabrics_names() -> None:
    world = DreamWorld(cpu(devices=2, dp_replicate=1, dp_shard=2, precision="bf16-mixed"))
    assert world.precision == "bf16-mixed"
