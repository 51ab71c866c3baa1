"""Floating-point operations of a step, and what devices can do."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

#: Dense 10^12 operations per second by data type, as the vendors give them, without sparsity. A
#: name is a part of what ``torch.cuda.get_device_name`` says; the first one that fits counts.
PEAK_TERAFLOPS: tuple[tuple[str, Mapping[str, float]], ...] = (
    ("B200", {"bf16": 2250.0, "fp16": 2250.0}),
    ("H200", {"bf16": 989.4, "fp16": 989.4, "tf32": 494.7, "fp32": 66.9}),
    ("H100 PCIe", {"bf16": 756.5, "fp16": 756.5, "tf32": 378.0, "fp32": 51.0}),
    ("H100 NVL", {"bf16": 835.5, "fp16": 835.5, "tf32": 417.5, "fp32": 60.0}),
    ("H100", {"bf16": 989.4, "fp16": 989.4, "tf32": 494.7, "fp32": 66.9}),
    ("A100", {"bf16": 312.0, "fp16": 312.0, "tf32": 156.0, "fp32": 19.5}),
    ("A10", {"bf16": 125.0, "fp16": 125.0, "tf32": 62.5, "fp32": 31.2}),
    ("L40S", {"bf16": 362.0, "fp16": 362.0, "tf32": 183.0, "fp32": 91.6}),
    ("L4", {"bf16": 121.0, "fp16": 121.0, "tf32": 60.0, "fp32": 30.3}),
    ("V100", {"fp16": 125.0, "fp32": 15.7}),
    ("T4", {"fp16": 65.0, "fp32": 8.1}),
    ("RTX 4090 Laptop", {}),
    ("RTX 4090 D", {}),
    ("RTX 4090", {"bf16": 165.2, "fp16": 165.2, "tf32": 82.6, "fp32": 82.6}),
    ("RTX 3090", {"bf16": 71.0, "fp16": 71.0, "tf32": 35.6, "fp32": 35.6}),
)


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Operations per second that a device can do at most; None if it is not in the table.

    Args:
        device: of this rank.
        precision: in Fabric's names.
    """
    if device.type != "cuda":
        return None
    return known_peak(torch.cuda.get_device_name(device), _number_format(precision))


def known_peak(name: str, number_format: str) -> float | None:
    """The same by the name of the device.

    Args:
        name: as torch tells it.
        number_format: ``"bf16"``, ``"fp16"``, ``"tf32"`` or ``"fp32"``.
    """
    by_format = next((formats for part, formats in PEAK_TERAFLOPS if _names(part, name)), {})
    tera = by_format.get(number_format)
    return None if tera is None else tera * 1e12


def _names(part: str, name: str) -> bool:
    # As words: an L40 is no L4.
    return f" {part} ".replace("-", " ") in f" {name} ".replace("-", " ")


def _number_format(precision: str) -> str:
    if precision.startswith("bf16"):
        return "bf16"
    if precision.startswith("16"):
        return "fp16"
    if not precision.startswith("32"):
        return precision
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "fp32"


def has_compiled() -> bool:
    """Whether ``torch.compile`` has compiled something in this process.

    Under a dispatch mode compiled functions run uncompiled, and stay so afterwards.
    """
    dynamo: Any = sys.modules.get("torch._dynamo.utils")
    return dynamo is not None and dynamo.counters["frames"]["total"] > 0


class FlopCount(TorchDispatchMode):
    """Counts the operations of matrix products, convolutions and attention in a block.

    It looks at what is called and changes nothing; backward is counted as well. With torch's
    formulas (``torch.utils.flop_counter``), and without the hooks on modules that torch's own
    counter needs to tell them apart.

    Args:
        tp_size: ranks among which layers are split.

    Attributes:
        flops: counted on this rank.
    """

    def __init__(self, tp_size: int = 1) -> None:
        from torch.utils.flop_counter import flop_registry

        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0.0
        self._formulas, self._tp_size = flop_registry, tp_size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and count it."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = self._formulas.get(getattr(func, "_overloadpacket", func))
        if formula is not None:
            flops = formula(*args, **kwargs, out_val=result)
            # Shapes of a DTensor are those of the whole layer.
            is_split = any(kind.__name__ == "DTensor" for kind in types)
            self.flops += flops / self._tp_size if is_split else flops
        return result
