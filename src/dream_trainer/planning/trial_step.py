"""Whether an optimizer can step parameters that are divided as they are, tried on tiny ones."""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from dream_trainer.errors import ConfigError

#: Rows and columns of a trial parameter on one rank, at most.
_SMALL = 2


def step_problem(name: str, optimizer: Optimizer) -> ConfigError | None:
    """Why an optimizer cannot step divided parameters, if it can step whole ones.

    Not every operation is defined for them: torch's own Adafactor has one that is not.
    """
    if not any(isinstance(p, DTensor) for g in optimizer.param_groups for p in g["params"]):
        return None
    error = _error_of_step(optimizer, divided=True)
    if error is None or _error_of_step(optimizer, divided=False) is not None:
        return None
    reason = str(error).partition("\n")[0]
    return ConfigError(
        "configure_optimizers",
        [f"{name} ({type(optimizer).__name__}) cannot step divided parameters: {reason}"],
        "Use another optimizer, or copies of the model only (dp_replicate).",
    )


def _error_of_step(optimizer: Optimizer, *, divided: bool) -> Exception | None:
    """What a step raises, with tiny parameters in place of the optimizer's."""
    trial = copy.copy(optimizer)
    trial.state = defaultdict(dict)
    trial.param_groups = [_tiny_group(group, divided) for group in optimizer.param_groups]
    try:
        # By the class: a scheduler hangs a step of the original's on the object.
        type(optimizer).step(trial)
    except Exception as error:  # noqa: BLE001 - whatever an optimizer does
        return error
    return None


def _tiny_group(group: dict[str, Any], divided: bool) -> dict[str, Any]:
    alike = {
        (p.dim(), p.dtype, p.placements if isinstance(p, DTensor) else None): p
        for p in group["params"]
        if p.requires_grad
    }
    params = [nn.Parameter(_tiny(p, divided)) for p in alike.values()]
    for parameter, original in zip(params, alike.values(), strict=True):
        parameter.grad = _tiny(original, divided)
    plain = dict.fromkeys({"fused", "foreach"} & group.keys())
    return {**group, **plain, "params": params}


def _tiny(parameter: Tensor, divided: bool) -> Tensor:
    shape = [min(size, _SMALL) for size in parameter.shape]
    tiny = torch.full(shape, 0.5, dtype=parameter.dtype)
    if not divided or not isinstance(parameter, DTensor):
        return tiny
    return DTensor.from_local(tiny, parameter.device_mesh, parameter.placements, run_check=False)
