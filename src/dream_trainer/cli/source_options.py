"""The options of a trainer, read from its source: no module of it is imported."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Set
from functools import cached_property

from dream_trainer.cli.source_classes import (
    Alias,
    SourceClass,
    SourceModule,
    Sources,
    class_values,
    dotted_name,
    statements,
)
from dream_trainer.cli.source_fields import FieldReader, Option, Values

_TRAINER = "dream_trainer.trainer.abstract.AbstractTrainer"
#: The ones that every run has, beside those that a configuration adds.
RUN_CALLBACKS = {
    "lr": "dream_trainer.callbacks.learning_rate.LearningRateMonitor",
    "metrics": "dream_trainer.callbacks.metric_logger.MetricLogger",
    "summary": "dream_trainer.callbacks.run_summary.RunSummary",
    "progress": "dream_trainer.callbacks.progress_bar.ProgressBar",
    "checkpoint": "dream_trainer.callbacks.checkpoint.CheckpointCallback",
    "timeline": "dream_trainer.callbacks.timeline.Timeline",
}
#: Where subclasses are looked for, besides the trainer's module and the base class's own.
_MORE_CLASSES = {
    "dream_trainer.callbacks.callback.Callback": "dream_trainer.callbacks",
    "torch.optim.Optimizer": "torch.optim",
    "torch.optim.optimizer.Optimizer": "torch.optim",
    "torch.optim.lr_scheduler.LRScheduler": "torch.optim.lr_scheduler",
}


class TrainerSource:
    """A trainer class as its source shows it.

    Args:
        sources: finds other modules.
        trainer: the class.
    """

    def __init__(self, sources: Sources, trainer: SourceClass) -> None:
        self._sources, self._trainer = sources, trainer
        self._reader = FieldReader(sources)

    @cached_property
    def config(self) -> SourceClass | None:
        """The dataclass that annotates ``config``; None if the source does not tell."""
        for owner in self._sources.opened_lineage(self._trainer):
            for node in statements(owner.node.body):
                if isinstance(node, ast.AnnAssign) and dotted_name(node.target) == "config":
                    return self._reader.values(owner.module, node.annotation).section
        return None

    def presets(self) -> list[str]:
        """Names of the presets, the inherited ones first."""
        found: dict[str, Alias] = {}
        for owner in reversed(list(self._sources.opened_lineage(self._trainer))):
            for name, value in class_values(owner):
                if name == "presets" and value is not None:
                    found |= _entries(Alias(owner.module, value))
        return [name for name, one in found.items() if not _is_none(one.node)]

    def options(self, path: str, given: Mapping[str, str]) -> list[Option]:
        """The options one level below a dotted name, as far as the source tells.

        Args:
            path: a section, a mapping or an option that takes a class; empty for the top.
            given: options of the command line and their values, for the classes among them.
        """
        if not path:
            return list(self._reader.fields(self.config).values()) if self.config else []
        option = self.option(path, given)
        if option is None:
            return []
        values = option.values
        if values.section is not None:
            return list(self._reader.fields(values.section).values())
        if values.entries is not None:
            names = dict.fromkeys(RUN_CALLBACKS if path == "callbacks" else ())
            names |= dict.fromkeys(_entries(option.default))
            names |= dict.fromkeys(_below(path, given))
            return [self._entry(path, name, option) for name in names]
        if not values.bases:
            return []
        chosen = self._chosen(path, option, given)
        own = self._reader.arguments(chosen) if chosen else []
        return [*own, Option("help", Values(bases=values.bases), "list the options of a class")]

    def option(self, path: str, given: Mapping[str, str]) -> Option | None:
        """The option of a dotted name; None if there is none, as far as the source tells."""
        above, _, name = path.rpartition(".")
        if above:
            owner = self.option(above, given)
            if owner is not None and owner.values.entries is not None:
                return self._entry(above, name, owner)
        return next((one for one in self.options(above, given) if one.name == name), None)

    def class_names(self, values: Values) -> list[str]:
        """Short names of the classes that may be given, where the source tells."""
        return sorted({name.rpartition(".")[2] for name in self._subclasses(values)})

    def _entry(self, path: str, name: str, mapping: Option) -> Option:
        default = _entries(mapping.default).get(name)
        if default is None and path == "callbacks" and name in RUN_CALLBACKS:
            default = Alias(self._trainer.module, ast.Constant(RUN_CALLBACKS[name]))
        return Option(name, mapping.values.entries or Values(), "", default)

    def _chosen(self, path: str, option: Option, given: Mapping[str, str]) -> SourceClass | None:
        """The class whose arguments can follow: of the command line, else of the default."""
        if name := given.get(path) or given.get(f"{path}.class_path"):
            known = (
                one for one in self._subclasses(option.values) if f".{one}".endswith(f".{name}")
            )
            return self._sources.defined(next(known, name))
        if option.default is None:
            return None
        made = option.default.node
        if isinstance(made, ast.Constant) and isinstance(made.value, str):
            return self._sources.defined(made.value)
        called = dotted_name(made.func if isinstance(made, ast.Call) else made)
        found = self._sources.meaning(option.default.module, called) if called else None
        return found if isinstance(found, SourceClass) else None

    def _subclasses(self, values: Values) -> list[str]:
        """Dotted names of the classes that derive from any of the bases."""
        bases = {base if isinstance(base, str) else base.name for base in values.bases}
        near = [self._trainer, self.config, *values.bases]
        homes = {one.module.name: one.module for one in near if isinstance(one, SourceClass)}
        found = [
            one.name
            for module in homes.values()
            for one in self._sources.classes(module)
            if self._can_stand_for(one, bases)
        ]
        for base in bases & _MORE_CLASSES.keys():
            if (door := self._sources.module(_MORE_CLASSES[base])) is not None:
                there = (self._behind(door, name, bases) for name in door.bindings)
                found += [name for name in there if name is not None]
        return list(dict.fromkeys(found))

    def _behind(self, door: SourceModule, name: str, bases: Set[str]) -> str | None:
        """The dotted name of a class that a package offers; None for its other names."""
        found = self._sources.meaning(door, name)
        if isinstance(found, SourceClass):
            return found.name if self._can_stand_for(found, bases) else None
        # torch.optim is not opened further: what it imports from its own modules are optimizers.
        if not isinstance(found, str) or not found.startswith(f"{door.name}."):
            return None
        last = found.rpartition(".")[2]
        return found if last[0].isupper() and last != "Optimizer" else None

    def _can_stand_for(self, one: SourceClass, bases: Set[str]) -> bool:
        line = [base if isinstance(base, str) else base.name for base in self._sources.lineage(one)]
        abstract = {dotted_name(base) for base in one.node.bases} & {"ABC", "Protocol"}
        return not (bases.isdisjoint(line) or abstract or one.node.name.startswith("_"))


def is_trainer(sources: Sources, one: SourceClass) -> bool:
    """Whether a class derives from one of this package's trainers."""
    return any(base.name == _TRAINER for base in sources.opened_lineage(one))


def _entries(mapping: Alias | None) -> dict[str, Alias]:
    """The entries of a mapping that is written out, ``{"a": b}`` or ``dict(a=b)``."""
    if mapping is None:
        return {}
    node = mapping.node
    if isinstance(node, ast.Dict):
        pairs = zip(node.keys, node.values, strict=True)
        named = [(str(key.value), one) for key, one in pairs if isinstance(key, ast.Constant)]
    else:
        keywords = node.keywords if isinstance(node, ast.Call) else []
        named = [(one.arg, one.value) for one in keywords if one.arg is not None]
    return {name: Alias(mapping.module, value) for name, value in named}


def _below(path: str, given: Mapping[str, str]) -> list[str]:
    """Entries of a mapping that the command line has named already."""
    inside = [name.removeprefix(f"{path}.") for name in given if name.startswith(f"{path}.")]
    return [name.partition(".")[0] for name in inside]


def _is_none(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is None
