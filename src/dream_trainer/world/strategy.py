"""DeviceParameters to Fabric arguments: one table."""

from __future__ import annotations

import difflib
import os
import warnings
from datetime import timedelta
from typing import Any

import torch
from lightning.fabric.plugins.precision import DoublePrecision, MixedPrecision
from lightning.fabric.strategies import STRATEGY_REGISTRY, DDPStrategy

from dream_trainer.configs import DeviceParameters
from dream_trainer.errors import ConfigError
from dream_trainer.world.launchers import IS_INTERACTIVE, Launched, find_launcher
from dream_trainer.world.mesh_strategy import MeshStrategy


def fabric_arguments(parameters: DeviceParameters) -> dict[str, Any]:
    """Keyword arguments of ``Fabric`` for a device configuration.

    Under torchrun and its like the launcher has decided how many processes there are, so
    ``devices="auto"`` and ``num_nodes=1`` take that instead of looking at the hardware.

    Raises:
        ConfigError: the launcher started other processes than the configuration asks for, or the
            layout cannot run here.
    """
    launched = find_launcher()
    local = _launched_locally(parameters, launched) if launched else local_processes(parameters)
    nodes = launched.nodes if launched else parameters.num_nodes
    size = launched.size if launched else local * nodes
    arguments: dict[str, Any] = {
        "accelerator": parameters.accelerator,
        "devices": local if parameters.devices == "auto" else parameters.devices,
        "num_nodes": nodes,
        "precision": parameters.precision,
    }
    if parameters.layout == "custom":
        if launched is None:
            arguments["devices"] = parameters.devices
        arguments["strategy"] = parameters.strategy
    else:
        arguments["strategy"] = _own_strategy(parameters, size, is_launched=launched is not None)
    if parameters.layout == "mesh":
        arguments |= _mesh_precision(parameters)
    has_own = getattr(arguments["strategy"], "cluster_environment", None) is not None
    if launched is not None and launched.environment is not None and not has_own:
        arguments["plugins"] = [*arguments.get("plugins", ()), launched.environment]
    return _yielding_to_fabric_run(arguments, parameters)


def refusal(parameters: DeviceParameters, error: Exception) -> ConfigError:
    """What Fabric said when it could not be built, in two lines: why not, and what can be used."""
    name = parameters.strategy if isinstance(parameters.strategy, str) else None
    why = " ".join(str(error).split())
    if name is not None and name in STRATEGY_REGISTRY:
        family = next((f for f in _FAMILIES if name.startswith(f)), None)
        reason, instead = _FAMILIES.get(family or "", ("", ""))
        return ConfigError("device_parameters", [f"strategy={name!r}: {reason or why}"], instead)
    if name is not None and "invalid strategy name" in why:
        names = ["auto", *STRATEGY_REGISTRY]
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        why = f"Fabric has no strategy={name!r}{hint}"
        instead = f"Leave it out: the sizes choose one. Or take one of: {', '.join(names)}."
        return ConfigError("device_parameters", [why], instead)
    return ConfigError("device_parameters", [why], _instead(parameters, why))


def _instead(parameters: DeviceParameters, why: str) -> str:
    if "CPUAccelerator" in why and isinstance(parameters.devices, list):
        return f"CPU ranks are not numbered: devices={len(parameters.devices)}."
    return "Change accelerator, devices, precision or strategy."


_SHARDED = "dp_shard=2 or more shards by FSDP2 and runs on the CPU, too."
_TPU = "it needs torch_xla and a TPU", "Leave strategy out: the sizes choose one that runs here."
#: Start of a name in Fabric's registry -> what it needs, and what there is instead.
_FAMILIES = {
    "fsdp": ("FSDP1 needs a GPU", f"Leave strategy out: {_SHARDED}"),
    "deepspeed": ("it needs the package deepspeed and a GPU", f"Install it, or: {_SHARDED}"),
    "xla": _TPU,
    "single_xla": _TPU,
    "single_tpu": _TPU,
}


def _mesh_precision(parameters: DeviceParameters) -> dict[str, Any]:
    """Precisions that Fabric has for one device, but refuses by name for sharded strategies."""
    if parameters.precision == "64-true":
        return {"precision": None, "plugins": [DoublePrecision()]}
    if parameters.precision == "16-mixed":
        if parameters.accelerator == "cpu" or not torch.cuda.is_available():
            # What Fabric does on one CPU, so that one and several give the same.
            warnings.warn("16-mixed on the CPU is not supported: bf16-mixed instead", stacklevel=2)
            return {"precision": "bf16-mixed"}
        return {"precision": None, "plugins": [MixedPrecision("16-mixed", "cuda")]}
    return {}


def local_processes(parameters: DeviceParameters) -> int:
    """Processes on this machine that a configuration asks for, without a launcher."""
    devices = parameters.devices
    if isinstance(devices, str) and devices not in ("auto", "-1"):
        return int(devices) if devices.strip().isdigit() else len(devices.strip(", ").split(","))
    if isinstance(devices, list):
        return len(devices)
    if isinstance(devices, int) and devices > 0:
        return devices
    if IS_INTERACTIVE and devices == "auto":
        return 1  # as Fabric does: who wants more in a notebook says so
    if parameters.accelerator in ("auto", "cuda", "gpu"):
        return max(torch.cuda.device_count(), 1)
    return 1


def _launched_locally(parameters: DeviceParameters, launched: Launched) -> int:
    """Processes that the launcher started here, if they are those that were asked for."""
    asked = launched.local if parameters.devices == "auto" else local_processes(parameters)
    problems, ways = [], [f"start them with {launched.how.format(asked)}"]
    if asked != launched.local:
        problems.append(
            f"devices={parameters.devices!r} asks for {_processes(asked)} on each machine, "
            f"{launched.by} started {launched.local}"
        )
    if parameters.num_nodes not in (1, launched.nodes):
        problems.append(
            f"num_nodes={parameters.num_nodes}, {launched.by} started processes on {launched.nodes}"
        )
        ways = ways if len(problems) > 1 else [f"start them on {parameters.num_nodes} machines"]
    if problems:
        raise ConfigError(
            "device_parameters",
            problems,
            f'Leave devices at "auto" and num_nodes at 1, or {ways[0]}.',
        )
    return launched.local


def _own_strategy(parameters: DeviceParameters, size: int, *, is_launched: bool) -> Any:
    """What the sizes choose, for so many ranks."""
    parameters.resolve(size)  # sizes that cannot work are refused before anything starts
    timeout = timedelta(seconds=parameters.timeout_seconds)
    forks = IS_INTERACTIVE and not is_launched and size > 1
    if parameters.layout == "mesh":
        if forks:
            raise ConfigError(
                "device_parameters",
                ["a notebook forks its ranks, which works for DDP, not for a sharded model"],
                "Run a script (python train.py, torchrun), or set DeviceParameters.DDP().",
            )
        return MeshStrategy(
            dp_replicate=parameters.dp_replicate,
            dp_shard=parameters.dp_shard,
            tensor_parallel=parameters.tensor_parallel,
            cpu_offload=parameters.cpu_offload,
            timeout=timeout,
        )
    if size == 1:
        return "auto"
    return DDPStrategy(timeout=timeout, start_method="fork" if forks else "popen")


def _yielding_to_fabric_run(
    arguments: dict[str, Any], parameters: DeviceParameters
) -> dict[str, Any]:
    """Leave to ``fabric run`` what it was told and the configuration leaves open.

    Fabric refuses to start if it finds both, even where they mean the same.
    """
    if os.environ.get("LT_CLI_USED") != "1":
        return arguments
    default = DeviceParameters()
    if "LT_STRATEGY" in os.environ and parameters.layout == "mesh":
        raise ConfigError(
            "device_parameters",
            [f"its sizes choose MeshStrategy, fabric run chose {os.environ['LT_STRATEGY']}"],
            "Leave out --strategy of fabric run, or leave dp_shard and tensor_parallel at 1.",
        )
    open_ones = {
        "strategy": ("auto", parameters.strategy is None),
        "devices": ("auto", parameters.devices == default.devices),
        "precision": (None, parameters.precision == default.precision),
    }
    return arguments | {
        name: fabrics_default
        for name, (fabrics_default, is_open) in open_ones.items()
        if is_open and f"LT_{name.upper()}" in os.environ
    }


def _processes(number: int) -> str:
    return f"{number} process{'es' * (number != 1)}"
