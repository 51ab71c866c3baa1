"""Where a run executes: devices, layout of ranks, precision."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from dream_trainer.configs.numbers import is_count
from dream_trainer.configs.quantities import Duration, DurationField, convert_durations
from dream_trainer.errors import ConfigError

Size = int | Literal["auto"]
Layout = Literal["single", "ddp", "mesh", "custom"]

PRECISIONS = (
    "32-true",
    "16-mixed",
    "bf16-mixed",
    "16-true",
    "bf16-true",
    "64-true",
    "transformer-engine",
    "transformer-engine-float16",
)
_TIMEOUT, _FAILURE_TIMEOUT = Duration("10m"), Duration("20s")
_SIZES = ("dp_replicate", "dp_shard", "tensor_parallel")


@dataclass(kw_only=True)
class DeviceParameters:
    """Devices, the layout of ranks over them, and precision.

    The three sizes multiply to the world size; at most one is ``"auto"`` and takes what is
    left. They choose the strategy: all 1 on one process is a single device, only
    ``dp_replicate`` is DDP, anything sharded or tensor parallel is
    `MeshStrategy`.

    Raises:
        ConfigError: with all problems of the values at once.
    """

    accelerator: str = "auto"
    """``"cpu"``, ``"cuda"``, ``"gpu"``, ``"mps"``, ``"tpu"`` or ``"auto"``, as in Fabric."""
    devices: int | str | list[int] = "auto"
    """Devices per node: how many, which ones, or ``"auto"`` for all (one process on CPU)."""
    num_nodes: int = 1
    """Machines that take part."""
    dp_replicate: Size = "auto"
    """Data-parallel copies of the model."""
    dp_shard: Size = 1
    """Ranks that one copy of the model is sharded over (FSDP2)."""
    tensor_parallel: Size = 1
    """Ranks that one layer is split over."""
    precision: str = "32-true"
    """Fabric's names: ``"32-true"``, ``"bf16-mixed"``, ``"16-mixed"``, ``"bf16-true"``, ..."""
    strategy: Any = None
    """A Fabric strategy, by name or instance, passed through untouched instead of the sizes."""
    compile_model: bool = False
    """Compile every model with ``torch.compile`` (the policy ``apply_compile``)."""
    checkpoint_activations: bool = False
    """Recompute activations in backward (the policy ``apply_activation_checkpointing``)."""
    cpu_offload: bool = False
    """Keep sharded parameters and optimizer state in CPU memory; needs ``dp_shard``."""
    timeout_seconds: DurationField = _TIMEOUT  # type: ignore[assignment]
    """How long a collective waits for the other ranks before it fails: ``10m``, or seconds."""
    failure_timeout_seconds: DurationField = _FAILURE_TIMEOUT  # type: ignore[assignment]
    """How long without a sign of life until a rank counts as failed: ``20s``, or seconds. Shortly
    after that all ranks have ended. Raise it if one call of Python can keep a rank busy longer."""

    def __post_init__(self) -> None:
        problems = [
            f"{name}={value!r} is neither 'auto' nor a whole number above 0"
            for name, value in self._sizes().items()
            if value != "auto" and not is_count(value)
        ]
        autos = [name for name, value in self._sizes().items() if value == "auto"]
        if len(autos) > 1:
            problems.append(f"{' and '.join(autos)} are both 'auto'; at most one size can be")
        if self.precision not in PRECISIONS:
            problems.append(f"precision={self.precision!r} is none of {', '.join(PRECISIONS)}")
        if not is_count(self.num_nodes):
            problems.append(f"num_nodes={self.num_nodes!r} is not a whole number above 0")
        if not _names_devices(self.devices):
            problems.append(
                f"devices={self.devices!r} is neither a number above 0, nor a list of different "
                "numbers, nor 'auto'"
            )
        problems += convert_durations(self, "timeout_seconds", "failure_timeout_seconds")
        shortest = self.failure_timeout_seconds
        if isinstance(shortest, Duration) and 0 < shortest < 2:
            problems.append(f"failure_timeout_seconds={shortest} is not 2 seconds or more")
        others = self.dp_shard != 1 or self.tensor_parallel != 1
        if self.strategy is not None and (others or self.dp_replicate not in ("auto", 1)):
            problems.append(
                f"strategy={self.strategy!r} is not told dp_replicate, dp_shard and "
                "tensor_parallel, which choose a strategy themselves: leave them or it out"
            )
        if self.cpu_offload and self.strategy is not None:
            problems.append(
                f"cpu_offload=True is nothing that strategy={self.strategy!r} would be told: leave "
                "strategy out and set dp_shard above 1, or ask the strategy itself to offload"
            )
        elif self.cpu_offload and self.dp_shard == 1:
            problems.append("cpu_offload=True needs a sharded model: set dp_shard above 1")
        if problems:
            raise ConfigError("device_parameters", problems)

    @classmethod
    def SINGLE_DEVICE(cls, **kwargs: Any) -> DeviceParameters:
        """One process on one device."""
        return cls(**{"devices": 1, "dp_replicate": 1} | kwargs)

    @classmethod
    def DDP(cls, **kwargs: Any) -> DeviceParameters:
        """Every rank holds a copy of the model; gradients are averaged."""
        return cls(**{"dp_replicate": "auto"} | kwargs)

    @classmethod
    def FSDP(cls, dp_shard: Size = "auto", **kwargs: Any) -> DeviceParameters:
        """One copy of the model, sharded over ``dp_shard`` ranks (FSDP2)."""
        return cls(**{"dp_replicate": 1, "dp_shard": dp_shard} | kwargs)

    @classmethod
    def HSDP(cls, dp_shard: Size, **kwargs: Any) -> DeviceParameters:
        """Copies of the model, each sharded over ``dp_shard`` ranks."""
        return cls(**{"dp_replicate": "auto", "dp_shard": dp_shard} | kwargs)

    @property
    def layout(self) -> Layout:
        """What the sizes choose. An ``"auto"`` counts as above 1."""
        if self.strategy is not None:
            return "custom"
        if self.dp_shard != 1 or self.tensor_parallel != 1:
            return "mesh"
        return "single" if self.dp_replicate == 1 else "ddp"

    @property
    def is_resolved(self) -> bool:
        """Whether no size is ``"auto"``."""
        return "auto" not in self._sizes().values()

    def resolve(self, world_size: int) -> DeviceParameters:
        """A copy whose sizes are numbers that multiply to ``world_size``.

        A pure function: any world size can be tried on a laptop.

        Raises:
            ConfigError: the sizes do not multiply to ``world_size``.
        """
        sizes = self._sizes()
        fixed = math.prod(value for value in sizes.values() if value != "auto")
        written = " x ".join(f"{name}={value}" for name, value in sizes.items())
        auto = next((name for name, value in sizes.items() if value == "auto"), None)
        if world_size % fixed or (auto is None and fixed != world_size):
            verb = "cannot divide" if auto else "does not make"
            raise ConfigError(
                "device_parameters",
                [f"{written} {verb} a world of {world_size} rank{'s' * (world_size != 1)}"],
                f"Set devices and num_nodes so that there are {fixed} ranks"
                f"{' or a multiple of that' if auto else ''}, or change the sizes.",
            )
        left: dict[str, Any] = {} if auto is None else {auto: world_size // fixed}
        return replace(self, **left)

    def _sizes(self) -> dict[str, Size]:
        return {name: getattr(self, name) for name in _SIZES}


def _names_devices(devices: object) -> bool:
    if isinstance(devices, str):
        text = devices.strip()
        if text in ("auto", "-1") or text.isdigit():
            return text != "0"
        return _are_indices([int(p) if p.strip().isdigit() else p for p in text.split(",") if p])
    if isinstance(devices, list):
        return _are_indices(devices)
    return devices == -1 or is_count(devices)


def _are_indices(devices: list[Any]) -> bool:
    whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in devices)
    return whole and 0 < len(devices) == len(set(devices))
