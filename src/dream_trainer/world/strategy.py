"""DeviceParameters to Fabric arguments: one table."""

from __future__ import annotations

import os
import warnings
from datetime import timedelta
from typing import Any

import torch
from lightning.fabric.plugins.precision import DoublePrecision, MixedPrecision
from lightning.fabric.strategies import STRATEGY_REGISTRY, DDPStrategy

from dream_trainer.configs import DeviceParameters
from dream_trainer.errors import ConfigError
from dream_trainer.world.mesh_strategy import MeshStrategy


def fabric_arguments(parameters: DeviceParameters) -> dict[str, Any]:
    """Keyword arguments of ``Fabric`` for a device configuration.

    Under torchrun and its like the launcher has decided how many processes there are, so
    ``devices="auto"`` takes that instead of looking at the hardware.
    """
    local = local_processes(parameters)
    nodes = _launched_nodes() or parameters.num_nodes
    common = {
        "accelerator": parameters.accelerator,
        "devices": local if parameters.devices == "auto" else parameters.devices,
        "num_nodes": nodes,
        "precision": parameters.precision,
    }
    timeout = timedelta(seconds=parameters.timeout_seconds)
    layout = parameters.layout
    if layout == "custom":
        return common | {"devices": parameters.devices, "strategy": parameters.strategy}
    if layout == "mesh":
        strategy = MeshStrategy(
            dp_replicate=parameters.dp_replicate,
            dp_shard=parameters.dp_shard,
            tensor_parallel=parameters.tensor_parallel,
            cpu_offload=parameters.cpu_offload,
            timeout=timeout,
        )
        return common | {"strategy": strategy} | _mesh_precision(parameters)
    parameters.resolve(local * nodes)  # sizes that cannot work are refused before anything starts
    if local * nodes == 1:
        return common | {"strategy": "auto"}
    return common | {"strategy": DDPStrategy(timeout=timeout)}


def refusal(parameters: DeviceParameters, error: Exception) -> ConfigError:
    """What Fabric said when it could not be built, in two lines: why not, and what can be used."""
    name = parameters.strategy if isinstance(parameters.strategy, str) else None
    why = " ".join(str(error).split())
    if name is not None and name in STRATEGY_REGISTRY:
        family = next((f for f in _FAMILIES if name.startswith(f)), None)
        reason, instead = _FAMILIES.get(family or "", ("", ""))
        return ConfigError("device_parameters", [f"strategy={name!r}: {reason or why}"], instead)
    instead = f"Names: {', '.join(['auto', *STRATEGY_REGISTRY])}." if name else ""
    return ConfigError("device_parameters", [why], instead)


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
    """Processes on this machine that a configuration asks for."""
    if (launched := os.environ.get("LOCAL_WORLD_SIZE")) and parameters.devices == "auto":
        return int(launched)
    devices = parameters.devices
    if isinstance(devices, str) and devices not in ("auto", "-1"):
        return int(devices) if devices.strip().isdigit() else len(devices.strip(", ").split(","))
    if isinstance(devices, list):
        return len(devices)
    if isinstance(devices, int) and devices > 0:
        return devices
    if parameters.accelerator in ("auto", "cuda", "gpu"):
        return max(torch.cuda.device_count(), 1)
    return 1


def _launched_nodes() -> int | None:
    world, local = os.environ.get("WORLD_SIZE"), os.environ.get("LOCAL_WORLD_SIZE")
    return int(world) // int(local) if world and local else None
