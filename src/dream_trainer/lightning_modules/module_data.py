"""The data of a LightningModule: its own, or that of a LightningDataModule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from dream_trainer.data import ResumableLoader
from dream_trainer.errors import ConfigError
from dream_trainer.lightning_modules.support import own_hooks
from dream_trainer.world import DreamWorld

_TRANSFER = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
_STAGE_OF = {"train": "fit", "val": "fit"}


class ModuleData:
    """Finds loaders and hooks of data; what a data module has comes before what the module has.

    Args:
        module: a LightningModule.
        datamodule: a LightningDataModule, or None.
        given: loaders by kind, which come before both.
    """

    def __init__(self, module: Any, datamodule: Any, given: Mapping[str, Any]) -> None:
        self._module, self._datamodule, self._given = module, datamodule, given
        self._own = {id(one): own_hooks(one) for one in self._everybody}
        self._stages: set[str] = set()

    def owner(self, name: str) -> Any:
        """Who has a method of its own; None if nobody has."""
        for one in self._everybody:
            if name in self._own[id(one)]:
                return one
        return None

    @property
    def _everybody(self) -> list[Any]:
        return [one for one in (self._datamodule, self._module) if one is not None]

    def prepare(self, world: DreamWorld) -> None:
        """``prepare_data``, on one process of each machine or of all. A collective."""
        for one in self._everybody:
            is_per_node = getattr(one, "prepare_data_per_node", True)
            if (world.local_rank if is_per_node else world.rank) == 0:
                one.prepare_data()
        world.barrier()

    def set_up(self, stage: str) -> None:
        """``setup``, once a stage."""
        if stage not in self._stages:
            self._stages.add(stage)
            for one in self._everybody:
                one.setup(stage)

    def tear_down(self, stage: str) -> None:
        """``teardown``."""
        for one in reversed(self._everybody):
            one.teardown(stage)

    def loader(self, kind: str) -> ResumableLoader | None:
        """The one loader of a kind: ``"train"``, ``"val"``, ``"test"`` or ``"predict"``.

        Raises:
            ConfigError: there are several.
        """
        self.set_up(_STAGE_OF.get(kind, kind))
        made, name = self._given.get(kind), f"{kind}_dataloader"
        if made is None and (owner := self.owner(name)) is not None:
            made = getattr(owner, name)()
        if isinstance(made, (list, tuple)) and len(made) <= 1:
            made = made[0] if made else None
        if made is None or isinstance(made, ResumableLoader):
            return made
        if isinstance(made, (list, tuple, Mapping)) or type(made).__name__ == "CombinedLoader":
            raise ConfigError(
                name,
                [f"it gives several loaders ({type(made).__name__})"],
                "Join their data sets (torch.utils.data.ConcatDataset), or read the others in "
                "hooks of the module.",
            )
        return ResumableLoader(made)

    @property
    def has_transfer_hooks(self) -> bool:
        """Whether anybody has something to do to a batch that moves."""
        return any(self.owner(name) is not None for name in _TRANSFER)

    def to_device(self, batch: Any, world: DreamWorld) -> Any:
        """Move a batch, with the hooks around it."""
        if (owner := self.owner("on_before_batch_transfer")) is not None:
            batch = owner.on_before_batch_transfer(batch, 0)
        if (owner := self.owner("transfer_batch_to_device")) is not None:
            device: torch.device = world.device
            batch = owner.transfer_batch_to_device(batch, device, 0)
        else:
            batch = world.to_device(batch)
        if (owner := self.owner("on_after_batch_transfer")) is not None:
            batch = owner.on_after_batch_transfer(batch, 0)
        return batch
