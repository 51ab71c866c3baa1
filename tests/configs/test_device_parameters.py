from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from dream_trainer.configs import DeviceParameters
from dream_trainer.errors import ConfigError

WORLDS = (1, 8, 512, 4096)


def sizes(parameters: DeviceParameters) -> tuple[object, object, object]:
    return parameters.dp_replicate, parameters.dp_shard, parameters.tensor_parallel


def test_all_problems_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        DeviceParameters(
            devices=0,
            num_nodes=0,
            dp_shard="auto",
            tensor_parallel=0,
            precision="fp8",
            strategy="ddp",
            timeout_seconds=0.0,
        )
    words = [problem.split("=")[0].split(" ")[0] for problem in caught.value.problems]
    assert words == [
        "tensor_parallel",
        "dp_replicate",
        "precision",
        "num_nodes",
        "devices",
        "timeout_seconds",
        "strategy",
    ]
    assert str(caught.value).startswith("device_parameters:\n  - ")


@pytest.mark.parametrize("size", [0, -1, 1.5, "all", None, True])
@pytest.mark.parametrize("name", ["dp_replicate", "dp_shard", "tensor_parallel"])
def test_a_size_is_auto_or_a_whole_number_above_0(name: str, size: object) -> None:
    with pytest.raises(ConfigError, match=f"{name}={size!r} is neither 'auto' nor a whole number"):
        DeviceParameters(**{"dp_replicate": 1, name: size})


def test_at_most_one_size_is_auto() -> None:
    with pytest.raises(ConfigError, match="dp_replicate and dp_shard are both 'auto'"):
        DeviceParameters(dp_shard="auto")


@pytest.mark.parametrize("size", ["dp_replicate", "dp_shard", "tensor_parallel"])
def test_sizes_beside_a_strategy_are_refused(size: str) -> None:
    with pytest.raises(ConfigError, match="strategy='ddp' is not told dp_replicate, dp_shard"):
        DeviceParameters(strategy="ddp", **{size: 4})


def test_offloading_an_unsharded_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="set dp_shard above 1"):
        DeviceParameters(cpu_offload=True)
    assert DeviceParameters.FSDP(cpu_offload=True).cpu_offload
    with pytest.raises(ConfigError, match="strategy='ddp' would be told: leave"):
        DeviceParameters(strategy="ddp", cpu_offload=True)


def test_values_of_a_wrong_type_are_problems_like_all_others() -> None:
    wrong: dict[str, Any] = {
        "devices": [],
        "num_nodes": "2",
        "timeout_seconds": "600x",
        "failure_timeout_seconds": None,
    }
    with pytest.raises(ConfigError) as caught:
        DeviceParameters(**wrong)
    problems = sorted(caught.value.problems)
    assert [problem.split(" ")[0] for problem in problems] == [
        "devices=[]",
        "failure_timeout_seconds=None",
        "num_nodes='2'",
        "timeout_seconds='600x'",
    ]


@pytest.mark.parametrize("devices", [[], [0, 0], [-2], [True], ["0"], "", ",", "0", "1,1", 0, True])
def test_what_names_no_devices(devices: Any) -> None:
    with pytest.raises(ConfigError, match="neither a number above 0, nor a list"):
        DeviceParameters(devices=devices)


@pytest.mark.parametrize("devices", [[0], [0, 2], "auto", "-1", "3", "0,", "1, 2", 1, -1])
def test_what_names_devices(devices: Any) -> None:
    assert DeviceParameters(devices=devices).devices == devices


@pytest.mark.parametrize(
    ("parameters", "layout"),
    [
        (DeviceParameters.SINGLE_DEVICE(), "single"),
        (DeviceParameters.DDP(), "ddp"),
        (DeviceParameters(), "ddp"),
        (DeviceParameters.FSDP(), "mesh"),
        (DeviceParameters.FSDP(dp_shard=2), "mesh"),
        (DeviceParameters.HSDP(dp_shard=2), "mesh"),
        (DeviceParameters(tensor_parallel=2), "mesh"),
        (DeviceParameters(dp_replicate=1), "single"),
        (DeviceParameters(dp_replicate=4), "ddp"),
        (DeviceParameters(strategy="ddp_spawn"), "custom"),
    ],
)
def test_the_sizes_choose_the_layout(parameters: DeviceParameters, layout: str) -> None:
    assert parameters.layout == layout


def test_presets_take_every_other_field() -> None:
    preset = DeviceParameters.HSDP(dp_shard=4, precision="bf16-mixed", devices=8, num_nodes=2)
    assert (preset.precision, preset.devices, preset.num_nodes) == ("bf16-mixed", 8, 2)
    assert DeviceParameters.SINGLE_DEVICE(accelerator="cpu").devices == 1


@pytest.mark.parametrize("world", WORLDS)
def test_what_is_auto_takes_the_ranks_that_are_left(world: int) -> None:
    tensor, shard = min(world, 8), min(world, 4)
    assert sizes(DeviceParameters.DDP().resolve(world)) == (world, 1, 1)
    assert sizes(DeviceParameters.FSDP().resolve(world)) == (1, world, 1)
    assert sizes(DeviceParameters.HSDP(dp_shard=shard).resolve(world)) == (
        world // shard,
        shard,
        1,
    )
    assert sizes(DeviceParameters.FSDP(tensor_parallel=tensor).resolve(world)) == (
        1,
        world // tensor,
        tensor,
    )
    auto_tensor = DeviceParameters(dp_replicate=1, dp_shard=shard, tensor_parallel="auto")
    assert sizes(auto_tensor.resolve(world)) == (1, shard, world // shard)


@pytest.mark.parametrize("world", WORLDS)
def test_resolve_is_a_pure_function(world: int) -> None:
    parameters = DeviceParameters.HSDP(dp_shard=1)
    before = dataclasses.asdict(parameters)
    resolved = parameters.resolve(world)
    assert dataclasses.asdict(parameters) == before
    assert not parameters.is_resolved
    assert resolved.is_resolved
    assert math.prod(sizes(resolved)) == world
    assert parameters.resolve(world) == resolved == resolved.resolve(world)


@pytest.mark.parametrize(
    ("parameters", "world", "says"),
    [
        (DeviceParameters.HSDP(dp_shard=3), 8, "cannot divide a world of 8 ranks"),
        (DeviceParameters(dp_replicate=2, dp_shard=2), 8, "does not make a world of 8 ranks"),
        (DeviceParameters(dp_replicate=2, dp_shard=8), 8, "does not make a world of 8 ranks"),
        (DeviceParameters.HSDP(dp_shard=2), 1, "cannot divide a world of 1 rank"),
    ],
)
def test_sizes_that_do_not_make_the_world_are_refused_with_the_next_move(
    parameters: DeviceParameters, world: int, says: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        parameters.resolve(world)
    place, move = str(caught.value).splitlines()
    assert says in place
    assert all(f"{name}=" in place for name in ("dp_replicate", "dp_shard", "tensor_parallel"))
    assert move.startswith("Set devices and num_nodes so that there are ")
    assert move.endswith("or change the sizes.")


def test_fields_are_given_by_name() -> None:
    with pytest.raises(TypeError):
        DeviceParameters("cpu")  # type: ignore[misc]
