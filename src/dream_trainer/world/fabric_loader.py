"""A ``DataLoader`` behind Fabric's wrapper: what the wrapper does, step by step."""

from __future__ import annotations

from typing import Any

from lightning.fabric.utilities import move_data_to_device
from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.fabric.wrappers import _FabricDataLoader
from torch.utils.data import DataLoader


class FabricLoader:
    """What ``fabric.setup_dataloaders`` returned.

    Args:
        wrapper: that.
    """

    def __init__(self, wrapper: _FabricDataLoader) -> None:
        self.wrapper = wrapper
        self.loader: DataLoader[Any] = wrapper._dataloader

    @property
    def num_iterations(self) -> int:
        """How often it was read in this process; the order of its sampler follows from it."""
        return self.wrapper._num_iter_calls

    @num_iterations.setter
    def num_iterations(self, number: int) -> None:
        self.wrapper._num_iter_calls = number

    def begin_iteration(self) -> None:
        """What the wrapper does before it reads the first batch."""
        _set_sampler_epoch(self.loader, self.num_iterations)
        self.num_iterations += 1

    def moved(self, batch: Any) -> Any:
        """A batch where the wrapper brings it."""
        device = self.wrapper.device
        return batch if device is None else move_data_to_device(batch, device)

    @classmethod
    def of(cls, loader: Any) -> FabricLoader | None:
        """None if Fabric has not wrapped it."""
        return cls(loader) if isinstance(loader, _FabricDataLoader) else None


__all__ = ["FabricLoader"]
