"""plan_run: a run set up as rank 0 of many, measured, and thrown away."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch

from dream_trainer.configs import DeviceParameters
from dream_trainer.errors import ConfigError
from dream_trainer.planning.epochs import (
    LoaderPlan,
    StepPlan,
    plan_loader,
    plan_steps,
    too_few_samples,
)
from dream_trainer.planning.layout import layout_notes, layout_of, node_problem
from dream_trainer.planning.memory import measure
from dream_trainer.planning.run_plan import RunPlan
from dream_trainer.planning.trial_step import step_problem
from dream_trainer.randomness import preserved, seed_cpu
from dream_trainer.trainer.base import BaseTrainer, BaseTrainerConfig
from dream_trainer.trainer.loaders import accumulation_scheduler, adopt_loader
from dream_trainer.world.planned_world import PlannedWorld, known_layout, uneven_splits

#: What launchers set and Fabric, or a trainer, reads: those of torchrun, and the one by which each
#: scheduler is known.
_LAUNCHED = {"RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"}
_LAUNCHED |= {"SLURM_NTASKS", "LSB_DJOB_RANKFILE"}

Config = TypeVar("Config", bound=BaseTrainerConfig)


def plan_run(
    make_trainer: Callable[[Config], BaseTrainer],
    config: Config,
    num_ranks: int,
    *,
    ranks_per_node: int = 8,
) -> RunPlan:
    """Tell what a configuration means on ``num_ranks`` ranks, in this process alone.

    Models are made on the meta device and laid out by the policies of the real run, as rank 0 of a
    fake process group (a private part of torch, ``torch.testing._internal``); the other ranks are
    computed. Loaders are made for real and counted, not read. Nothing is started, opened or
    written, no accelerator is used, and ``config`` stays as it is. Callbacks are not called.

    Args:
        make_trainer: the trainer's class, or any function from a configuration to a trainer.
        config: of the run; its ``accelerator``, ``devices`` and ``num_nodes`` are not looked at.
        num_ranks: processes of the run, one for each device.
        ranks_per_node: of them on one machine.

    Returns:
        Layout, memory, data and steps of the run; ``str(plan)`` is a table.

    Raises:
        ConfigError: with every reason for which the run cannot work.
        RuntimeError: this process is in a process group already.
        Exception: what the trainer's own methods raise.
    """
    if num_ranks < 1 or ranks_per_node < 1:
        raise ConfigError(
            "plan", [f"{num_ranks} ranks, {ranks_per_node} on each node: both must be above 0"]
        )
    if not isinstance(config, BaseTrainerConfig):
        raise ConfigError(
            "plan",
            [f"{type(config).__name__} is no BaseTrainerConfig, so there is no loop to plan"],
            "Derive the trainer from BaseTrainer or DreamTrainer.",
        )
    problems = [p for p in [node_problem(num_ranks, ranks_per_node)] if p is not None]
    resolved, is_laid_out = config.device_parameters, False
    with _collected(problems):
        resolved = known_layout(resolved).resolve(num_ranks)
        is_laid_out = True
    if not is_laid_out:
        # One rank finds the problems that have nothing to do with their number.
        resolved, num_ranks = DeviceParameters.SINGLE_DEVICE(precision=resolved.precision), 1
    if not config.training_parameters.is_limited:
        problems.append(
            ConfigError(
                "training_parameters",
                ["n_epochs, max_steps and max_time are all None, so nothing ends the run"],
                "Set one of them.",
            )
        )
    with preserved(), _without_launcher():
        planner = _Planner(make_trainer, config, resolved, num_ranks, problems)
        try:
            return planner.plan(ranks_per_node)
        finally:
            planner.close()


class _Planner:
    """One planning: the trainer, and what was found so far.

    Args:
        make_trainer: as for `plan_run`.
        config: of the run.
        resolved: its device parameters, for ``num_ranks``.
        num_ranks: processes.
        problems: to which others are added.
    """

    def __init__(
        self,
        make_trainer: Callable[[Any], BaseTrainer],
        config: BaseTrainerConfig,
        resolved: DeviceParameters,
        num_ranks: int,
        problems: list[ConfigError],
    ) -> None:
        self.make_trainer, self.config = make_trainer, config
        self.resolved, self.num_ranks = resolved, num_ranks
        self.problems, self.notes = problems, list[str]()
        self.world: PlannedWorld | None = None
        self.has_data = True

    def plan(self, ranks_per_node: int) -> RunPlan:
        """Everything; raises at the end with all problems."""
        trainer, world = self._configured()
        try:
            self._set_up(trainer)
            self.problems += world.problems
            splits = (uneven_splits(*one) for one in trainer.named_models().items())
            steps = (step_problem(*one) for one in trainer.named_optimizers().items())
            self.problems += [problem for problem in (*splits, *steps) if problem is not None]
            train, val, counted = self._count(trainer, world)
        except Exception as error:
            # It may be a consequence of what is known to be wrong.
            _refuse(self.problems, error)
            raise
        _refuse(self.problems)
        layout = layout_of(self.resolved, self.num_ranks, ranks_per_node)
        sizes = {counted.accumulation or 1}
        if (scheduler := accumulation_scheduler(trainer.callbacks)) is not None:
            sizes |= set(scheduler.scheduling.values())
        is_accumulating = max(sizes) > 1
        memory = measure(trainer, world, layout, is_accumulating=is_accumulating)
        return RunPlan(
            layout=layout,
            precision=self.resolved.precision,
            memory=memory,
            train=train,
            val=val,
            steps=counted,
            epochs=self.config.training_parameters.n_epochs,
            notes=(*self._offloaded(), *layout_notes(layout), *memory.notes(layout), *self.notes),
        )

    def _offloaded(self) -> list[str]:
        if not self.resolved.cpu_offload:
            return []
        return ["parameters, gradients and optimizer state are in CPU memory (cpu_offload)"]

    def close(self) -> None:
        """Leave the fake process group."""
        if self.world is not None:
            self.world.close()

    def _configured(self) -> tuple[BaseTrainer, PlannedWorld]:
        """The trainer with its models, on the meta device if they can be made there."""
        try:
            return self._configured_on("meta")
        except ConfigError as error:
            self.problems.append(error)
            _refuse(self.problems)
            raise
        except Exception as error:  # noqa: BLE001 - whatever a constructor does with values
            reason = f"{type(error).__name__}: {error}"
        self.close()
        made = self._configured_on("cpu")
        self.notes.append(
            f"models were made on the CPU, in full, where the meta device was not enough ({reason})"
        )
        return made

    def _configured_on(self, device: str) -> tuple[BaseTrainer, PlannedWorld]:
        given = copy.copy(self.config)
        # A trainer looks for its devices when it is made; those of the run are not here.
        given.device_parameters = DeviceParameters.SINGLE_DEVICE(accelerator="cpu")
        trainer = self.make_trainer(given)
        self.world = world = PlannedWorld(self.resolved, self.num_ranks, device)
        trainer.world = world
        trainer.config = config = copy.copy(self.config)
        config.device_parameters = self.resolved
        config.experiment = config.experiment or "planned"
        config.seed = 0 if config.seed is None else config.seed
        seed_cpu(config.seed)
        with torch.device(device):
            trainer.configure()
        return trainer, world

    def _set_up(self, trainer: BaseTrainer) -> None:
        if (make_loaders := getattr(trainer, "configure_dataloaders", None)) is not None:
            # The data may be on the cluster only; the rest of the plan needs none.
            vars(trainer)["configure_dataloaders"] = lambda: self._loaders(make_loaders)
        with _collected(consequences := list[ConfigError]()):
            trainer.setup()
        if self.has_data:
            self.problems += consequences

    def _loaders(self, make_loaders: Callable[[], Any]) -> Any:
        try:
            return make_loaders()
        except ConfigError as error:
            self.problems.append(error)
        except Exception as error:  # noqa: BLE001 - whatever a data set raises that is not here
            self.notes.append(
                "nothing is known of the data: configure_dataloaders raised "
                f"{type(error).__name__}: {error}"
            )
        self.has_data = False
        return _NoData(), None

    def _count(
        self, trainer: BaseTrainer, world: PlannedWorld
    ) -> tuple[LoaderPlan | None, LoaderPlan | None, StepPlan]:
        """Batches and steps, as far as they are known."""
        parameters, dp_size = trainer.training_parameters, world.dp_size
        plans: dict[str, LoaderPlan] = {}
        steps = StepPlan(None, parameters.global_batch_size, None, None, parameters.max_steps)
        in_use: dict[str, Any] = {}
        for name in ("train_dataloader", "val_dataloader"):
            loader = getattr(trainer, name)
            if not self.has_data or loader is None:
                continue
            with _collected(self.problems):
                seed = trainer.seed
                adopted = adopt_loader(loader, name, world, seed, parameters, in_use)
                plans[name] = plan = plan_loader(adopted, dp_size)
                if name == "train_dataloader":
                    scheduler = accumulation_scheduler(trainer.callbacks)
                    steps = plan_steps(adopted, parameters, dp_size, scheduler)
                    if (problem := too_few_samples(name, plan, dp_size)) is not None:
                        self.problems.append(problem)
                else:
                    limit = parameters.val_batch_limit(plan.batches)
                    steps = replace(steps, val_batches=limit and min(limit, plan.batches or limit))
        return plans.get("train_dataloader"), plans.get("val_dataloader"), steps


@contextmanager
def _without_launcher() -> Iterator[None]:
    """What a launcher says of this process is not of the ranks that are planned."""
    names = [name for name in os.environ if name in _LAUNCHED or name.startswith("LT_")]
    hidden = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ.update(hidden)


class _NoData:
    """Stands where the train loader would."""

    def __iter__(self) -> Iterator[Any]:
        return iter(())


@contextmanager
def _collected(problems: list[ConfigError]) -> Iterator[None]:
    try:
        yield
    except ConfigError as error:
        problems.append(error)


def _refuse(problems: list[ConfigError], cause: Exception | None = None) -> None:
    """Raise what was collected, each reason with its own next move."""
    if len(problems) == 1:
        raise problems[0] from cause
    if problems:
        reasons = []
        for error in problems:
            *others, last = (f"{error.place}: {problem}" for problem in error.problems)
            reasons += [*others, f"{last}. {error.next_move}".removesuffix(". ")]
        raise ConfigError("plan", reasons) from cause
