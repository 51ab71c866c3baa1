"""Overview: what a run is about to do, for people."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from dream_trainer.callbacks.screen import as_text
from dream_trainer.configs import TrainingParameters
from dream_trainer.data import ResumableLoader
from dream_trainer.errors import ConfigError
from dream_trainer.lazy_names import loading
from dream_trainer.storage.sizes import size
from dream_trainer.words import counted
from dream_trainer.world.component_state import clean_name
from dream_trainer.world.sharded import is_dtensor, is_fsdp_module

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from dream_trainer.trainer.base import BaseTrainer
    from dream_trainer.world import DreamWorld

#: Children of one module that are listed; a model of a hundred layers would hide all else.
_MOST_CHILDREN = 12
_PLAIN_WIDTH = 100


@dataclass(frozen=True)
class ModuleSize:
    """A module, or several of them, by what they hold. A shared parameter counts once."""

    name: str
    """Dotted, with the model's name in front."""
    type: str
    """Its class; empty for what stands for several."""
    depth: int
    """0 for a model."""
    parameters: int
    """Elements of its parameters, undivided."""
    trainable: int
    """Of them, those that get gradients."""
    whole: int
    """Bytes of its parameters, undivided."""
    local: int
    """Bytes of them on this rank."""

    def __add__(self, other: ModuleSize) -> ModuleSize:
        return ModuleSize(
            self.name,
            self.type,
            self.depth,
            self.parameters + other.parameters,
            self.trainable + other.trainable,
            self.whole + other.whole,
            self.local + other.local,
        )


@dataclass(frozen=True)
class Overview:
    """What a run is about to do; as a string, a text of some lines."""

    heading: str
    """Where it is, and how it starts."""
    devices: str
    """Ranks, device, strategy, precision, seed."""
    modules: tuple[ModuleSize, ...]
    """Models and their parts, in order."""
    data: str
    """Samples and batches."""
    batch: str
    """How many samples a step sees."""
    length: str
    """Epochs and steps."""
    num_steps: int | None
    """Steps of the whole run, if they are known."""

    def __str__(self) -> str:
        # The heading in one line: a path that is cut in two cannot be copied.
        return f"{self.heading}\n{as_text(_table(self), width=_PLAIN_WIDTH)}"

    def __rich__(self) -> RenderableType:
        with loading():
            from rich.console import Group
            from rich.text import Text

        return Group(Text(self.heading, style="bold"), _table(self))

    @property
    def total(self) -> ModuleSize:
        """All models."""
        models = [one for one in self.modules if one.depth == 0]
        return sum(models[1:], models[0]) if models else ModuleSize("", "", 0, 0, 0, 0, 0)

    @property
    def line(self) -> str:
        """The most important in one line."""
        known = self.num_steps
        steps = "" if known is None else f"{counted(known, 'step')}, "
        return f"{self.heading}: {steps}{self.total.parameters:,} parameters, {self.devices}"


def overview(trainer: BaseTrainer, heading: str, depth: int = 1) -> Overview:
    """Look at a trainer that is set up. No collective.

    Args:
        trainer: set up.
        heading: where it is, and how it starts.
        depth: levels of modules below each model.
    """
    loop, world, parameters = trainer.loop, trainer.world, trainer.training_parameters
    try:
        num_steps = trainer.num_training_steps
    except ConfigError:
        num_steps = None
    return Overview(
        heading=heading,
        devices=", ".join(
            (_devices(world), _strategy_words(world), world.precision, f"seed {trainer.seed}")
        ),
        modules=tuple(_modules(trainer, depth)),
        data=_data(loop.train_loader, loop.val_loader, parameters),
        batch=_batch(loop.train_loader, world, trainer.window.size),
        length=_length(parameters, num_steps),
        num_steps=num_steps,
    )


# ------------------------------------------------------------------ its parts


def _devices(world: DreamWorld) -> str:
    device, nodes = world.device, getattr(world.strategy, "num_nodes", 1)
    name = f"cuda ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else device.type
    on_nodes = f" on {nodes} nodes" if nodes > 1 else ""
    return f"{counted(world.size, 'rank')}{on_nodes} on {name}"


def _strategy_words(world: DreamWorld) -> str:
    mesh = world.mesh
    name = type(world.strategy).__name__.removesuffix("Strategy")
    if mesh is not None and mesh.mesh_dim_names:
        sizes = (f"{one} {mesh.size(i)}" for i, one in enumerate(mesh.mesh_dim_names))
        return f"{name} ({' x '.join(sizes)})"
    return {"SingleDevice": "single device"}.get(name, name)


def _modules(trainer: BaseTrainer, depth: int) -> Iterator[ModuleSize]:
    seen: set[int] = set()
    for name, model in trainer.components.models.items():
        yield from _listed(_sizes(name, model, depth, seen), name, 0)


def _sizes(name: str, model: nn.Module, depth: int, seen: set[int]) -> dict[str, ModuleSize]:
    """Sizes by dotted name, of the model and of its modules that hold something."""
    types = {_dotted(name, one): _type(module) for one, module in model.named_modules()}
    sizes = {name: ModuleSize(name, types[name], 0, 0, 0, 0, 0)}
    for own, parameter in model.named_parameters():
        if id(parameter) in seen:
            continue
        seen.add(id(parameter))
        # Of a divided one this is the number of elements of the whole.
        number, itemsize = parameter.numel(), parameter.element_size()
        local = parameter.to_local() if is_dtensor(parameter) else parameter
        trainable = number if parameter.requires_grad else 0
        *parents, _ = _dotted(name, own).split(".")
        levels = len(name.split("."))
        for level in range(levels, min(len(parents), levels + depth) + 1):
            place = ".".join(parents[:level])
            one = ModuleSize(
                place,
                types.get(place, ""),
                level - levels,
                number,
                trainable,
                number * itemsize,
                local.numel() * itemsize,
            )
            sizes[place] = sizes[place] + one if place in sizes else one
    return sizes


def _listed(sizes: dict[str, ModuleSize], name: str, depth: int) -> Iterator[ModuleSize]:
    """A module and what is below it; of many children the first ones, and the sum of the rest."""
    yield sizes[name]
    below = [
        one for key, one in sizes.items() if one.depth == depth + 1 and key.startswith(f"{name}.")
    ]
    shown = below if len(below) <= _MOST_CHILDREN else below[: _MOST_CHILDREN - 2]
    for one in shown:
        yield from _listed(sizes, one.name, depth + 1)
    if rest := below[len(shown) :]:
        together = sum(rest[1:], rest[0])
        yield ModuleSize(
            f"{name}.{len(rest)} more",
            "",
            depth + 1,
            together.parameters,
            together.trainable,
            together.whole,
            together.local,
        )


def _dotted(name: str, own: str) -> str:
    own = clean_name(f"{own}.").removesuffix(".")
    return f"{name}.{own}" if own else name


def _type(module: nn.Module) -> str:
    name = type(module).__name__
    return name.removeprefix("FSDP") if is_fsdp_module(module) else name


def _data(
    train: ResumableLoader, val: ResumableLoader | None, parameters: TrainingParameters
) -> str:
    words = f"train: {_loader(train, train.num_batches)}"
    if val is None:
        return f"{words}; no validation"
    known = [val.num_batches, parameters.val_batch_limit(val.num_batches)]
    num_batches = min((one for one in known if one is not None), default=None)
    return f"{words}; val: {_loader(val, num_batches)}"


def _loader(loader: ResumableLoader, num_batches: int | None) -> str:
    batches = "an unknown number of batches"
    if num_batches is not None:
        batches = counted(num_batches, "batch", "batches")
    samples = loader.num_samples_in_epoch
    return batches if samples is None else f"{samples:,} samples, {batches}"


def _batch(loader: ResumableLoader, world: DreamWorld, size: int) -> str:
    ranks, batch_size = world.dp_size, loader.batch_size
    factors = f"{counted(size, 'batch', 'batches')} x {counted(ranks, 'data-parallel rank')}"
    if batch_size is None:
        return f"{factors} a step, of an unknown number of samples"
    total = batch_size * size * ranks
    return f"{counted(batch_size, 'sample')} x {factors} = {counted(total, 'sample')} a step"


def _length(parameters: TrainingParameters, num_steps: int | None) -> str:
    limits = [
        counted(parameters.n_epochs, "epoch") if parameters.n_epochs is not None else "",
        f"max_steps {parameters.max_steps:,}" if parameters.max_steps is not None else "",
        f"max_time {parameters.max_time:,} s" if parameters.max_time is not None else "",
    ]
    words = ", ".join(filter(None, limits)) or "no end"
    return words if num_steps is None else f"{words}: {num_steps:,} optimizer steps"


# ------------------------------------------------------------------ drawn


def _table(what: Overview) -> RenderableType:
    with loading():
        from rich.table import Table
        from rich.text import Text

    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="bold")
    grid.add_column(overflow="fold")
    rows = {
        "devices": Text(what.devices),
        "model": _module_table(what),
        "data": Text(what.data),
        "batch": Text(what.batch),
        "length": Text(what.length),
    }
    for label, words in rows.items():
        grid.add_row(label, words)
    return grid


def _module_table(what: Overview) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    is_divided = what.total.local != what.total.whole
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
    table.add_column("module")
    for column in ("parameters", "trainable", "bytes", *["on this rank"] * is_divided):
        table.add_column(column, justify="right")
    models = [one for one in what.modules if one.depth == 0]
    rows = [(_module_name(one), one) for one in what.modules]
    if len(models) > 1:
        rows.append(("in all", what.total))
    for name, one in rows:
        sizes = (one.whole, one.local) if is_divided else (one.whole,)
        numbers = (f"{one.parameters:,}", f"{one.trainable:,}", *map(size, sizes))
        table.add_row(Text(name), *numbers)
    return table


def _module_name(one: ModuleSize) -> str:
    *_, last = one.name.rsplit(".", 1)
    name = last if one.depth else one.name
    kind = f" ({one.type})" if one.type else ""
    return "  " * one.depth + name + kind


def print_overview(what: Overview, console: Console) -> None:
    """In colours on a terminal; as text elsewhere, in which no name is cut for its width."""
    if console.is_terminal or console.is_jupyter:
        console.print(what.heading, style="bold", highlight=False, markup=False, soft_wrap=True)
        console.print(_table(what))
    else:
        console.print(str(what), highlight=False, markup=False, soft_wrap=True)


__all__ = ["ModuleSize", "Overview", "overview", "print_overview"]
