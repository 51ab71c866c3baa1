"""MemoryMonitor: memory of the device and of the process."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dream_trainer.callbacks.callback import Callback

if TYPE_CHECKING:
    from dream_trainer.trainer.base import BaseTrainer

_GIB = 2**30


class MemoryMonitor(Callback):
    """Measures the memory of the process and of the device.

    ``memory/process_gib`` is resident memory, ``memory/device_gib`` what tensors hold. On CUDA
    there are ``memory/device_reserved_gib``, what torch keeps from others, and
    ``memory/device_peak_gib``, the most that tensors held since the process started.

    Rank 0's own, in GiB, when a line of the timeline is written. No collective.
    """

    def pre_fit(self, trainer: BaseTrainer) -> None:
        """Begin, on rank 0."""
        if trainer.world.is_global_zero:
            device = trainer.world.device
            trainer.measured.ask("memory", lambda seconds: memory(device))


def memory(device: torch.device) -> dict[str, float | None]:
    """Of this process, in GiB, by name."""
    found: dict[str, float | None] = {"process_gib": _in_gib(process_bytes())}
    if device.type == "cuda":
        found["device_gib"] = _in_gib(torch.cuda.memory_allocated(device))
        found["device_reserved_gib"] = _in_gib(torch.cuda.memory_reserved(device))
        found["device_peak_gib"] = _in_gib(torch.cuda.max_memory_allocated(device))
    elif device.type == "mps":
        found["device_gib"] = _in_gib(torch.mps.current_allocated_memory())
        found["device_reserved_gib"] = _in_gib(torch.mps.driver_allocated_memory())
    return {f"memory/{name}": value for name, value in found.items()}


def process_bytes() -> int | None:
    """Resident memory of this process; where the system only tells the most it ever was, that."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _in_gib(number: int | None) -> float | None:
    return None if number is None else number / _GIB
