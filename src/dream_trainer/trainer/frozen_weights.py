"""Weights that never train: left out of checkpoints, and recognised when the run goes on."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dream_trainer.trainer.components import Components
from dream_trainer.world.component_state import clean_name
from dream_trainer.world.sharded import is_dtensor

#: Model -> parameter -> checksum of its bytes.
Checksums = dict[str, dict[str, int]]


class FrozenWeights:
    """Parameters that need no gradient, as they were when this was made.

    One that is unfrozen, or changed in place, or that an optimizer has a state of, is an ordinary
    one from then on.

    Args:
        components: of the trainer, with the weights that its program gives it at each start.
    """

    def __init__(self, components: Components) -> None:
        self._optimizers = list(components.optimizers.values())
        self._frozen = {
            (model, clean_name(name)): (parameter, parameter._version)
            for model, module in components.models.items()
            for name, parameter in module.named_parameters()
            if not parameter.requires_grad
        }
        self._known: dict[tuple[str, str], int] = {}

    def checksums(self) -> Checksums:
        """Of those that are still as they were. On every rank; the first call reads them all."""
        found: Checksums = {}
        for (model, name), (parameter, version) in self._frozen.items():
            if parameter.requires_grad or parameter._version != version:
                continue
            if any(parameter in optimizer.state for optimizer in self._optimizers):
                continue
            found.setdefault(model, {})[name] = self._checksum(model, name, parameter)
        return found

    def problems(self, saved: Mapping[str, Mapping[str, int]]) -> list[str]:
        """Where the weights of this process are not those that a checkpoint was made with."""
        if not saved:
            return []
        own = self.checksums()
        return [
            f"models.{model}.{name}: "
            + (
                "not frozen here, and the checkpoint leaves it out (save_frozen=False)"
                if name not in own.get(model, {})
                else "frozen, and not what it was when the checkpoint was made"
            )
            for model, checksums in saved.items()
            for name, checksum in checksums.items()
            if own.get(model, {}).get(name) != checksum
        ]

    def _checksum(self, model: str, name: str, parameter: nn.Parameter) -> int:
        if (model, name) not in self._known:
            self._known[model, name] = _crc32(parameter)
        return self._known[model, name]


def without(models: Mapping[str, Mapping[str, Any]], left_out: Checksums) -> dict[str, Any]:
    """The states of models without some parameters."""
    return {
        model: {name: value for name, value in state.items() if name not in left_out.get(model, {})}
        for model, state in models.items()
    }


def _crc32(parameter: Tensor) -> int:
    whole: Any = parameter.detach()
    if is_dtensor(whole):
        whole = whole.full_tensor()  # a collective
    flat = whole.cpu().contiguous().reshape(-1)
    return zlib.crc32(flat.view(torch.uint8).numpy()) if flat.numel() else 0
