"""AbstractTrainer: the bare contract."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

# Not its names, which load Fabric: neither --help nor a mistake in an option needs that. Nor under
# TYPE_CHECKING: jsonargparse runs such blocks of the modules that configurations are in.
from dream_trainer import world
from dream_trainer.errors import ConfigError, UnknownComponentError
from dream_trainer.progress import Progress
from dream_trainer.schedules import Schedule
from dream_trainer.trainer.trainer_config import AbstractTrainerConfig
from dream_trainer.world.wrappers import unwrap

T = TypeVar("T")


class AbstractTrainer(ABC):
    """What all trainers have: named components, state, a world to run in.

    Subclass `BaseTrainer` for the loop, `DreamTrainer` for the conventions, or this
    class to write everything yourself.

    Args:
        config: place, seed and devices of the run.
        fabric: a ``Fabric`` to run on, instead of one built from ``config.device_parameters``.

    Attributes:
        config: as given.
        world: ranks, device, collectives.
        progress: every counter of the run.
    """

    config: AbstractTrainerConfig

    def __init__(
        self, config: AbstractTrainerConfig, *, fabric: world.Fabric | None = None
    ) -> None:
        if not isinstance(config, AbstractTrainerConfig):
            raise ConfigError(
                type(self).__name__,
                [f"its configuration is a {type(config).__name__}"],
                f"Pass a {AbstractTrainerConfig.__name__} or a dataclass derived from it.",
            )
        self.config = config
        self.world = world.DreamWorld(config.device_parameters, fabric=fabric)
        self.progress = Progress()

    # ------------------------------------------------------------------ counters

    @property
    def global_step(self) -> int:
        """Optimizer steps taken, over all epochs and restarts."""
        return self.progress.num_steps

    @global_step.setter
    def global_step(self, value: int) -> None:
        self.progress.num_steps = value

    @property
    def current_epoch(self) -> int:
        """Index of the epoch under way, from 0."""
        return self.progress.epoch

    @current_epoch.setter
    def current_epoch(self, value: int) -> None:
        self.progress.epoch = value

    @property
    def local_batches(self) -> int:
        """Batches that went through ``training_step`` since this process started."""
        return self.progress.local_batches

    @local_batches.setter
    def local_batches(self, value: int) -> None:
        self.progress.local_batches = value

    # ------------------------------------------------------------------ contract

    @abstractmethod
    def configure(self) -> None:
        """Make models and everything else that needs no device."""

    @abstractmethod
    def setup(self) -> None:
        """Place what `configure` made on ``self.world.device``."""

    @abstractmethod
    def named_models(self) -> Mapping[str, nn.Module]:
        """Name -> model."""

    @abstractmethod
    def named_optimizers(self) -> Mapping[str, Optimizer]:
        """Name -> optimizer."""

    @abstractmethod
    def named_schedulers(self) -> Mapping[str, LRScheduler] | None:
        """Name -> learning-rate scheduler; None if there are none."""

    def named_schedules(self) -> Mapping[str, Schedule]:
        """When each of `named_schedulers` steps; the default is after each optimizer step.

        Raises:
            ConfigError: a scheduler cannot step so.
        """
        return {name: Schedule.of(one) for name, one in (self.named_schedulers() or {}).items()}

    @abstractmethod
    def get_module(self, fqn: str) -> nn.Module:
        """The module at ``"model.path.to.module"``."""

    @property
    @abstractmethod
    def train_dataloader(self) -> Iterable[Any]:
        """What training batches come from."""

    @property
    @abstractmethod
    def val_dataloader(self) -> Iterable[Any] | None:
        """What validation batches come from; None for no validation."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything the next step depends on, as nested plain data and tensors."""

    @abstractmethod
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` gave."""

    @abstractmethod
    def fit(self) -> None:
        """Train."""

    # ------------------------------------------------------------------ look-ups

    def get_name_by_model(self, model: nn.Module) -> str:
        """The name of a model, given as made or as wrapped by Fabric.

        Raises:
            UnknownComponentError: it is none of `named_models`.
        """
        return _name_of(model, self.named_models(), "model")

    def get_name_by_optimizer(self, optimizer: Optimizer) -> str:
        """The name of an optimizer, given as made or as wrapped by Fabric.

        Raises:
            UnknownComponentError: it is none of `named_optimizers`.
        """
        return _name_of(optimizer, self.named_optimizers(), "optimizer")

    def get_name_by_scheduler(self, scheduler: LRScheduler) -> str:
        """The name of a scheduler.

        Raises:
            UnknownComponentError: it is none of `named_schedulers`.
        """
        return _name_of(scheduler, self.named_schedulers() or {}, "scheduler")

    def get_scheduler_from_optimizer(self, optimizer: Optimizer) -> LRScheduler | None:
        """The scheduler that drives an optimizer, given as made or as wrapped; None without one.

        Raises:
            UnknownComponentError: the optimizer is none of `named_optimizers`.
        """
        self.get_name_by_optimizer(optimizer)
        for scheduler in (self.named_schedulers() or {}).values():
            # Fabric wraps optimizers in new objects, so identity alone would miss them.
            if unwrap(scheduler.optimizer) is unwrap(optimizer):
                return scheduler
        return None

    def schedulers_of(self, optimizer: Optimizer) -> list[Any]:
        """All schedulers that drive an optimizer, whoever steps them.

        Args:
            optimizer: as made or as wrapped.
        """
        every: Iterable[Any] = (self.named_schedulers() or {}).values()
        return [one for one in every if unwrap(one.optimizer) is unwrap(optimizer)]


def _name_of(wanted: Any, named: Mapping[str, Any], kind: str) -> str:
    for name, one in named.items():
        if unwrap(one) is unwrap(wanted):
            return name
    raise UnknownComponentError(
        f"this {type(wanted).__name__} is no {kind} of the trainer, which has: "
        f"{', '.join(named) or 'none'}. Return it from named_{kind}s()."
    )
