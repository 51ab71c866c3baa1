"""Parameters, gradients and optimizer state of a trainer that is set up in a planned world."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from dream_trainer.callbacks import WeightAveraging
from dream_trainer.planning.holdings import (
    Counts,
    TensorKind,
    add_counts,
    count_kinds,
    gathered_parts,
    local_bytes,
    state_counts,
    whole_bytes,
)
from dream_trainer.planning.layout import RankLayout
from dream_trainer.storage.sizes import size
from dream_trainer.trainer.base import BaseTrainer
from dream_trainer.trainer.components import Components
from dream_trainer.world.component_state import clean_name, module_state
from dream_trainer.world.mesh_strategy import TP, MeshStrategy
from dream_trainer.world.planned_world import PlannedWorld


@dataclass(frozen=True)
class Empty:
    """A parameter with fewer rows than ranks to share them."""

    name: str
    """Dotted, with the model's name in front."""
    shape: tuple[int, ...]
    """Of the whole parameter."""
    ranks: int
    """Ranks of a dp_shard group that hold nothing of it."""


@dataclass(frozen=True)
class ModelPlan:
    """One model."""

    name: str
    """As in ``named_models``."""
    type: str
    """Its class."""
    trainable: int
    """Elements of its parameters that get gradients."""
    frozen: int
    """Elements of the others."""
    parameters: Counts
    """Its parameters by kind."""
    buffers: Counts
    """Its buffers by kind."""
    gathered: tuple[str, int] | None
    """The part that FSDP gathers at once and is largest: its name (empty for the model itself) and
    bytes in the type that is computed in; None without FSDP."""
    empty: tuple[Empty, ...]
    """Parameters of which some ranks hold nothing, the worst first."""


@dataclass(frozen=True)
class OptimizerPlan:
    """One optimizer."""

    name: str
    """As in ``named_optimizers``."""
    type: str
    """Its class."""
    state: Counts | None
    """Its state after a step by kind; None if it makes none without values."""


@dataclass(frozen=True)
class MemoryPlan:
    """What ranks hold. A parameter that several models share is counted with the first."""

    models: tuple[ModelPlan, ...]
    """In the order of ``named_models``."""
    optimizers: tuple[OptimizerPlan, ...]
    """In the order of ``named_optimizers``."""
    averages: Counts
    """Averages of weights that callbacks keep."""
    gradients: Counts
    """When a step is taken."""
    window_gradients: Counts
    """Inside an accumulation window under FSDP, where gradients wait before they are added up over
    the ranks: undivided by dp_shard. Empty without FSDP or accumulation."""
    saved: Counts | None
    """Tensors of a checkpoint; None if an optimizer's state is not known."""
    rank_buffers: Counts
    """Buffers that a checkpoint holds once more for each rank."""

    def held(self, layout: RankLayout, rank: int) -> dict[str, int | None]:
        """Bytes on a rank; see `RunPlan.bytes_on`."""
        place = layout.coordinate(rank)

        def of(counts: Counts) -> int:
            return local_bytes(counts, layout.sizes, place)

        states = [one.state for one in self.optimizers]
        known = [state for state in states if state is not None]
        return {
            "parameters": sum(of(model.parameters) for model in self.models),
            "gradients": of(self.gradients),
            "optimizer_state": sum(map(of, known)) if len(known) == len(states) else None,
            "buffers": sum(of(model.buffers) for model in self.models),
            "averages": of(self.averages),
            "window_gradients": of(self.window_gradients),
            "checkpoint": None if self.saved is None else of(self._written(rank)),
            "gathered": max(
                (model.gathered[1] for model in self.models if model.gathered), default=0
            ),
        }

    def checkpoint_bytes(self, layout: RankLayout) -> int | None:
        """See `RunPlan.checkpoint_bytes`."""
        if self.saved is None:
            return None
        return whole_bytes(self.saved) + layout.num_ranks * whole_bytes(self.rank_buffers)

    def checkpoint_parts(self, layout: RankLayout) -> int | None:
        """How many pieces of tensors a checkpoint is written in."""
        if self.saved is None:
            return None
        parts = sum(kind.num_parts(layout.sizes) * number for kind, number in self.saved.items())
        return parts + layout.num_ranks * sum(self.rank_buffers.values())

    def _written(self, rank: int) -> Counts:
        """What a rank writes of a checkpoint, if no other has the same part."""
        saved = self.saved or {}
        # Of what is not divided rank 0's copy is written.
        mine = {kind: number for kind, number in saved.items() if kind.splits or rank == 0}
        return add_counts([mine, self.rank_buffers])

    def notes(self, layout: RankLayout) -> list[str]:
        """What is uneven, or not known."""
        notes = []
        for model in self.models:
            if model.empty:
                worst, shard = model.empty[0], layout.sizes["dp_shard"]
                alike = len(model.empty)
                notes.append(
                    f"{worst.name} {worst.shape} leaves {worst.ranks} of {shard} ranks with nothing"
                    + (f"; {alike} parameters of {model.name} do so" if alike > 1 else "")
                )
        if self.window_gradients:
            whole = local_bytes(self.window_gradients, layout.sizes, layout.coordinate(0))
            notes.append(
                "between the batches of a step FSDP keeps gradients that dp_shard does not divide, "
                f"{size(whole)} on each rank; one larger batch per step needs none"
            )
        notes += [
            f"the state of optimizer {one.name} ({one.type}) is not known: its step needs values"
            for one in self.optimizers
            if one.state is None
        ]
        return notes


def measure(
    trainer: BaseTrainer, world: PlannedWorld, layout: RankLayout, *, is_accumulating: bool
) -> MemoryPlan:
    """Count what a trainer holds.

    Args:
        trainer: set up in ``world``.
        world: which laid its models out.
        layout: of the ranks.
        is_accumulating: whether a step has several batches.
    """
    components = Components.of(trainer.named_models(), trainer.named_optimizers(), None)
    models = components.models
    computed, reduced = _mixed_types(world)
    seen: set[int] = set()
    plans, trained = [], []
    waiting: list[Counts] = []
    for name, model in models.items():
        own = {n: p for n, p in model.named_parameters() if id(p) not in seen}
        seen.update(map(id, own.values()))
        trained += [p for p in own.values() if p.requires_grad]
        plans.append(_model_plan(name, model, own, layout, computed))
        gathered = (p for _, part in gathered_parts(model) for p in part if p.requires_grad)
        waiting.append(_gathered(count_kinds(gathered), reduced or computed))
    optimizers = tuple(_optimizer_plan(*one) for one in components.optimizers.items())
    states = [one.state for one in optimizers if one.state is not None]
    saved = [_all_kinds(module_state(model)) for model in models.values()]
    persistent = [
        _all_kinds({n: t for n, t in module_state(model).items() if n in _buffer_names(model)})
        for model in models.values()
    ]
    averages = _averages(trainer, components)
    return MemoryPlan(
        models=tuple(plans),
        optimizers=optimizers,
        averages=averages,
        gradients=count_kinds(trained),
        window_gradients=add_counts(waiting) if is_accumulating else {},
        saved=add_counts([*saved, *states, averages]) if len(states) == len(optimizers) else None,
        rank_buffers=add_counts(persistent) if layout.num_ranks > 1 else {},
    )


def _model_plan(
    name: str,
    model: nn.Module,
    own: Mapping[str, nn.Parameter],
    layout: RankLayout,
    computed: torch.dtype | None,
) -> ModelPlan:
    parts = [
        (clean_name(part), _bytes_gathered(_gathered(count_kinds(parameters), computed), layout))
        for part, parameters in gathered_parts(model)
    ]
    empty = [
        Empty(f"{name}.{clean_name(n)}", tuple(p.shape), ranks)
        for n, p in own.items()
        if (ranks := TensorKind.of(p).num_without(layout.sizes, "dp_shard"))
    ]
    return ModelPlan(
        name=name,
        type=_type_name(model),
        trainable=sum(p.numel() for p in own.values() if p.requires_grad),
        frozen=sum(p.numel() for p in own.values() if not p.requires_grad),
        parameters=count_kinds(own.values()),
        buffers=count_kinds(model.buffers()),
        gathered=max(parts, key=lambda part: part[1], default=None),
        empty=tuple(sorted(empty, key=lambda one: -one.ranks)),
    )


def _averages(trainer: BaseTrainer, components: Components) -> Counts:
    return add_counts(
        {replace(TensorKind.of(weight), itemsize=dtype.itemsize): 1}
        for one in trainer.callbacks.of_kind(WeightAveraging).values()
        for weight, dtype in one.planned(components.models, components.optimizers)
    )


def _type_name(model: nn.Module) -> str:
    # FSDP gives a module a class of its own, derived from the user's.
    kind = type(model).__bases__[-1] if isinstance(model, FSDPModule) else type(model)
    return kind.__name__


def _optimizer_plan(name: str, optimizer: Optimizer) -> OptimizerPlan:
    return OptimizerPlan(name, type(optimizer).__name__, state_counts(optimizer))


def _mixed_types(world: PlannedWorld) -> tuple[torch.dtype | None, torch.dtype | None]:
    """Types that FSDP computes and reduces in, where they are not the parameters' own."""
    if not isinstance(world.strategy, MeshStrategy):
        return None, None
    policy = world.strategy.mixed_precision_policy
    return policy.param_dtype, policy.reduce_dtype


def _gathered(counts: Counts, dtype: torch.dtype | None) -> Counts:
    """Sharded tensors as they are between gather and free: split by tensor parallel only."""
    return add_counts(
        {
            TensorKind(
                kind.shape,
                dtype.itemsize if dtype else kind.itemsize,
                tuple(split for split in kind.splits if split[1] == TP),
            ): number
        }
        for kind, number in counts.items()
    )


def _bytes_gathered(counts: Counts, layout: RankLayout) -> int:
    return local_bytes(counts, layout.sizes, layout.coordinate(0))


def _all_kinds(tensors: Mapping[str, object]) -> Counts:
    # By name and not by identity: what two names share is saved twice.
    return add_counts(
        {TensorKind.of(t): 1} for t in tensors.values() if isinstance(t, torch.Tensor)
    )


def _buffer_names(model: nn.Module) -> set[str]:
    return {clean_name(name) for name, _ in model.named_buffers()}
