"""Runs of a notebook: its ranks are forked or spawned, and what they end with is brought back."""

from __future__ import annotations

import dataclasses
import pickle
import tempfile
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.multiprocessing import ProcessRaisedException

from dream_trainer.configs import DeviceParameters
from dream_trainer.errors import ConfigError, ProblemsError

if TYPE_CHECKING:
    from dream_trainer.trainer.base import BaseTrainer

#: Name of a method, and its arguments without and with names.
_Call = tuple[str, tuple[Any, ...], dict[str, Any]]


@dataclass
class Outcome:
    """How rank 0 ended."""

    result: Any = None
    """What the method returned."""
    error: ProblemsError | None = None
    """What it raised instead, if that is worth more than a traceback."""
    state: dict[str, Any] | None = None
    """The state of the trainer, on the CPU."""
    attributes: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What else a trainer shows after a run."""


def run_on_ranks(trainer: BaseTrainer, method: str, *arguments: Any, **options: Any) -> Outcome:
    """Call a method of the trainer on all of its ranks, in processes of their own.

    Raises:
        ConfigError: the ranks are spawned, and the trainer does not pickle.
        ProblemsError: rank 0 raised it.
        RuntimeError: a rank failed otherwise; with its traceback.
    """
    call = (method, arguments, options)
    _check_pickles(trainer, call)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "outcome")
        try:
            trainer.world.start(_on_rank, trainer, call, path)
        except ProcessRaisedException as error:
            known = _read(path).error if path.exists() else None
            if known is None:
                raise
            raise known from error
        return _read(path)


def bring_back(trainer: BaseTrainer, outcome: Outcome) -> None:
    """Make the trainer of this process, which has only started ranks, what rank 0's was.

    On the CPU and without ranks: a device that this process has used cannot be used by ranks that
    are forked later.
    """
    from dream_trainer.world import DreamWorld

    config = trainer.config = dataclasses.replace(trainer.config)
    config.experiment, config.seed = outcome.attributes["name"]
    trainer.world = DreamWorld(
        DeviceParameters.SINGLE_DEVICE(
            accelerator="cpu", precision=config.device_parameters.precision
        )
    )
    trainer.is_brought_back = True
    trainer.prepare()
    assert outcome.state is not None
    trainer.load_state_dict(outcome.state)
    trainer.stop_reason = outcome.attributes["stop_reason"]
    trainer.validation_results = outcome.attributes["validation_results"]


def _on_rank(trainer: BaseTrainer, call: _Call, path: Path) -> None:
    outcome = Outcome()
    method, arguments, options = call
    try:
        outcome.result = getattr(trainer, method)(*arguments, **options)
    except ProblemsError as error:
        if trainer.world.is_global_zero:
            torch.save(Outcome(error=error), path)
        raise
    if method == "fit":
        outcome.state = trainer.state_dict()
        outcome.attributes = {
            "name": (trainer.config.experiment, trainer.config.seed),
            "stop_reason": trainer.stop_reason,
            "validation_results": dict(trainer.validation_results),
        }
    if trainer.world.is_global_zero:
        torch.save(outcome, path)


def _read(path: Path) -> Outcome:
    # Our own, of a moment ago, in a folder that nobody else may write to.
    outcome: Outcome = torch.load(path, map_location="cpu", weights_only=False)
    return outcome


def _check_pickles(trainer: BaseTrainer, call: _Call) -> None:
    if not trainer.world.spawns:
        return
    try:
        ForkingPickler.dumps((trainer, call))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ConfigError(
            "device_parameters",
            [f"this strategy sends the trainer to its ranks, which fails: {error}"],
            'Keep what it holds in a module, or set strategy="ddp_fork".',
        ) from error
