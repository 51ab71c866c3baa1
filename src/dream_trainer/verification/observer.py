"""Observer: writes down, after every step, all that a resumed run must have again."""

from __future__ import annotations

import dis
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING, Any

from torch import nn

from dream_trainer.callbacks import Callback, MetricLogger
from dream_trainer.data.own_generators import GENERATORS
from dream_trainer.verification.digests import Leaf, leaf, leaves

if TYPE_CHECKING:
    from dream_trainer.trainer.base import BaseTrainer

_PACKAGE = __name__.partition(".")[0]
#: Says what a clock says.
_CLOCKS = ("trainer.progress.seconds",)
_ATTRIBUTES_OF_MODULES = frozenset(vars(nn.Module()))

Leaves = dict[str, Leaf]


@dataclass(frozen=True)
class Place:
    """A moment of a run at which it can be looked at."""

    step: int
    epoch: int
    num_batches: int
    """Without it, two batches that no optimizer step lies between would be one place."""
    in_epoch: bool
    is_end: bool = False
    """Whether this is ``post_fit``."""

    def __str__(self) -> str:
        if self.is_end:
            return f"the end of the run (step {self.step})"
        if self.in_epoch or not self.step:
            return f"step {self.step}"
        return f"the end of epoch {self.epoch - 1} (step {self.step})"


@dataclass(frozen=True)
class Observation:
    """What a run was made of at one place."""

    place: Place
    batches: Leaves = field(default_factory=dict)
    """What ``training_step`` was given since the place before."""
    state: Leaves = field(default_factory=dict)
    """The trainer's state."""
    attributes: Leaves = field(default_factory=dict)
    """Attributes of the trainer, its callbacks and modules. Some may be in the state as well."""
    data: Leaves = field(default_factory=dict)
    """Generators and counters of the train loader, its sampler and its data set."""
    is_saved: bool = False
    """Whether a checkpoint was committed here."""
    num_validations: int | None = None
    """Validations that have ended in this process; None if there is nothing to validate on."""
    run_directory: str = ""


class Observer(Callback):
    """The last of a trainer's callbacks; it has no state and draws nothing.

    Args:
        tell: is given each observation, when it is made.
        at_place: called after the observation of a place.
    """

    def __init__(
        self,
        tell: Callable[[Observation], None],
        at_place: Callable[[Place], None] = lambda place: None,
    ) -> None:
        self._tell, self._at_place = tell, at_place
        self._batches: Leaves = {}
        self._num_batches = self._num_validations = 0
        self._newest: Path | None = None

    def pre_fit(self, trainer: BaseTrainer) -> None:
        """What a run begins with."""
        self._newest = _newest_checkpoint(trainer)
        self._tell(
            Observation(
                _place(trainer),
                # Not the whole state: callbacks may not be able to give theirs yet.
                state=leaves({"models": trainer.components.state_dict()["models"]}),
                attributes=attributes_of_run(trainer),
                run_directory=str(trainer.run_directory),
            )
        )

    def pre_train_step(self, trainer: BaseTrainer, batch: Any, batch_idx: int) -> None:
        """A batch, before ``training_step`` can change it."""
        self._batches |= leaves(batch, f"batches.{self._num_batches}")
        self._num_batches += 1

    def post_validation_epoch(self, trainer: BaseTrainer, results: Mapping[str, float]) -> None:
        """Count."""
        self._num_validations += 1

    def on_boundary(self, trainer: BaseTrainer) -> None:
        """After a step, and after an epoch."""
        self._observe(trainer, _place(trainer))

    def post_fit(self, trainer: BaseTrainer) -> None:
        """After everything."""
        self._observe(trainer, replace(_place(trainer), is_end=True))

    def _observe(self, trainer: BaseTrainer, place: Place) -> None:
        newest = _newest_checkpoint(trainer)
        self._tell(
            Observation(
                place,
                self._batches,
                state_of_run(trainer),
                attributes_of_run(trainer),
                attributes_of_data(trainer),
                is_saved=newest != self._newest,
                num_validations=None if trainer.loop.val_loader is None else self._num_validations,
            )
        )
        self._newest, self._batches, self._num_batches = newest, {}, 0
        self._at_place(place)


def state_of_run(trainer: BaseTrainer) -> Leaves:
    """The leaves of ``trainer.state_dict()``, without clocks and without the log's length."""
    loggers = trainer.callbacks.of_kind(MetricLogger)
    # The log is compared line by line, where a value that is a time can be told apart.
    logs = {f"callbacks.{name}.{key}" for name in loggers for key in ("size", "crc32")}
    # Where a run ends is told as such, and why it was stopped may be any text.
    skipped = {*_CLOCKS, *logs, "trainer.stop_reason"}
    return {k: v for k, v in leaves(trainer.state_dict()).items() if k not in skipped}


def attributes_of_run(trainer: BaseTrainer) -> Leaves:
    """Attributes that users' classes have set on the trainer, its callbacks and modules."""
    found = _attributes(trainer, "trainer")
    for name in trainer.callbacks:
        found |= _attributes(trainer.callbacks[name], f"callbacks.{name}")
    for name, model in trainer.components.models.items():
        for path, module in model.named_modules(prefix=f"models.{name}"):
            found |= _attributes(module, path, _ATTRIBUTES_OF_MODULES)
    return found


def attributes_of_data(trainer: BaseTrainer) -> Leaves:
    """What of the train loader can be a position: generators, and numbers that count."""
    loader = trainer.loop.train_loader.loader
    owners = {"loader": loader}
    owners |= {n: getattr(loader, n, None) for n in ("dataset", "sampler", "batch_sampler")}
    kinds = (*GENERATORS, int, float)
    return {
        f"{owner}.{name}": found
        for owner, one in owners.items()
        for name, value in getattr(one, "__dict__", {}).items()
        if isinstance(value, kinds) and (found := leaf(value)) is not None
    }


def _attributes(owner: object, path: str, skipped: frozenset[str] = frozenset()) -> Leaves:
    skipped |= _set_by_this_package(type(owner))
    home: str | None = type(owner).__module__.partition(".")[0]
    home = None if home in (_PACKAGE, "torch") else home
    return {
        f"{path}.{name}": found
        for name, value in vars(owner).items()
        if name not in skipped and (found := leaf(value, home)) is not None
    }


def _set_by_this_package(kind: type[Any]) -> frozenset[str]:
    """Names that the methods of our own classes assign: clocks, caches, counters of a process."""
    ours = (one for one in kind.__mro__ if one.__module__.partition(".")[0] == _PACKAGE)
    return frozenset().union(*map(_assigned_by, ours))


@cache
def _assigned_by(kind: type[Any]) -> frozenset[str]:
    members = [getattr(member, "fset", member) for member in vars(kind).values()]
    return frozenset(
        instruction.argval
        for function in members
        if isinstance(function, FunctionType)
        for instruction in dis.get_instructions(function)
        if instruction.opname == "STORE_ATTR"
    )


def _place(trainer: BaseTrainer) -> Place:
    progress = trainer.progress
    return Place(progress.num_steps, progress.epoch, progress.num_batches, progress.in_epoch)


def _newest_checkpoint(trainer: BaseTrainer) -> Path | None:
    return next(reversed(trainer.checkpointer.store.paths()), None)
