"""States as flat mappings that ``==`` compares to the bit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from dream_trainer.world.sharded import is_dtensor

if TYPE_CHECKING:
    from dream_trainer.trainer.base import BaseTrainer


def flat_state(state: Any, path: str = "") -> dict[str, Any]:
    """Every leaf of a nested state by its path.

    A tensor becomes its dtype, shape and bytes, whole if it is sharded: every rank calls this.

    Args:
        state: nested mappings, lists and leaves.
        path: in front of the paths.
    """
    if isinstance(state, Mapping):
        return {
            k: v
            for key, value in state.items()
            for k, v in flat_state(value, f"{path}/{key}").items()
        }
    if isinstance(state, (list, tuple)):
        return {
            k: v
            for index, value in enumerate(state)
            for k, v in flat_state(value, f"{path}/{index}").items()
        }
    if isinstance(state, Tensor):
        whole = state.full_tensor() if is_dtensor(state) else state
        whole = whole.detach().cpu().contiguous()
        return {path: (str(whole.dtype), tuple(whole.shape), bytes(whole.view(-1).numpy().data))}
    return {path: state}


def exact_state(trainer: BaseTrainer) -> dict[str, Any]:
    """The whole state of a trainer as `flat_state` has it, without what a clock says."""
    state = flat_state(trainer.state_dict())
    return {key: value for key, value in state.items() if not key.endswith("progress/seconds")}


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Paths at which two flat states differ; compared with an empty list, a readable assert."""
    return sorted(k for k in one.keys() | other.keys() if one.get(k, "?") != other.get(k, "?"))
