"""Which tensors of a file are a model's weights, and which of a trainer's they stand for."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from torch import Tensor

from dream_trainer.errors import ConfigError
from dream_trainer.storage import Tree, TreePath

#: What wrappers of torch and Fabric put into names. DDP's ``module`` is a usual name, too: it
#: is taken away only where the trainer's models have no part of that name.
_WRAPPERS = frozenset(
    {"_forward_module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
)
_SHOWN = 40

Parts = tuple[str, ...]
_Rule = tuple[Parts, str | None]


@dataclass(frozen=True)
class StateDict:
    """One module's state inside a tree."""

    folder: Parts
    """Names of what it lies in, outermost first, without ``models`` and ``state_dict``."""
    places: Mapping[str, TreePath]
    """Key -> where it is in the tree."""
    loose: bool = False
    """Whether these are tensors beside state dicts: a random state, a step."""


def state_dicts(tree: Tree) -> list[StateDict]:
    """Everything in a tree that can be a module's state.

    States of optimizers are passed over. Of a run's state only its models count, of a Lightning
    checkpoint only its ``state_dict``.
    """
    found = list(_state_dicts(tree, (), ()))
    if len(found) > 1 and not found[0].folder:
        found[0] = StateDict((), found[0].places, loose=True)
    return found


def _state_dicts(tree: Tree, path: TreePath, folder: Parts) -> Iterator[StateDict]:
    if isinstance(tree, Mapping):
        if {"state", "param_groups"} <= tree.keys():
            return
        # A run's callbacks and gradients carry tensors under the names of parameters.
        is_run = {"models", "optimizers", "schedulers"} <= tree.keys()
        chosen = "models" if is_run else "state_dict"
        if isinstance(tree.get(chosen), Mapping):
            yield from _state_dicts(tree[chosen], (*path, chosen), folder)
            return
        places = {
            key: (*path, key)
            for key, value in tree.items()
            if isinstance(key, str) and (isinstance(value, Tensor) or _is_extra(key))
        }
        if places:
            yield StateDict(folder, places)
        children = [(key, value) for key, value in tree.items() if key not in places]
    elif isinstance(tree, (list, tuple)):
        children = list(enumerate(tree))
    else:
        return
    for key, value in children:
        if isinstance(value, (Mapping, list, tuple)):
            yield from _state_dicts(value, (*path, key), (*folder, str(key)))


def _is_extra(key: str) -> bool:
    """Whether it is what ``nn.Module.get_extra_state`` returned; that may be anything."""
    return key.rpartition(".")[2] == "_extra_state"


def averaged_places(tree: Tree, name: str, source: str) -> dict[TreePath, TreePath]:
    """Where a run's state has averages of weights: place of a weight -> place of its average.

    Args:
        tree: a run's state.
        name: of the callback that averaged them.
        source: what the tree was read from, for messages.

    Raises:
        ConfigError: it has none of that name.
    """
    callbacks = tree.get("callbacks") if isinstance(tree, Mapping) else None
    found: dict[str, dict[TreePath, TreePath]] = {}
    for callback, state in callbacks.items() if isinstance(callbacks, Mapping) else ():
        models = state.get("models") if isinstance(state, Mapping) else None
        places: dict[TreePath, TreePath] = {
            ("models", model, key): ("callbacks", callback, "models", model, key)
            for model, weights in (models.items() if isinstance(models, Mapping) else ())
            for key in weights
        }
        if places:
            found[callback] = places
    if name not in found:
        raise ConfigError(
            source,
            [f"it has no averages named {name!r}"],
            f"There is: {', '.join(found) or 'none'}.",
        )
    return found[name]


@dataclass(frozen=True)
class Matched:
    """Which weights of a file go where."""

    places: dict[str, TreePath] = field(default_factory=dict)
    """Own name -> where it is in the tree."""
    problems: list[str] = field(default_factory=list)
    """Weights that have no place, or share one."""


def match(
    tree: Tree,
    own: Collection[str],
    models: Sequence[str],
    rename: Mapping[str, str | None],
    source: str,
) -> Matched:
    """Find the own name of every weight in a tree.

    A weight is called by the dotted names of what it lies in and its key. Names that all weights
    lie in may be left out, and so may a trainer's model if it is the only one.

    Args:
        tree: where `state_dicts` are looked for.
        own: ``"model.path.to.parameter"`` of the trainer.
        models: names of its models.
        rename: prefix -> prefix, or None to leave out; in whole parts, the longest first.
        source: what the tree was read from, for messages.

    Raises:
        ConfigError: an entry of ``rename`` matches nothing.
    """
    noise = _WRAPPERS
    if not any("module" in name.split(".") for name in own):
        noise |= {"module"}
    rules = {old: (_clean(old, noise), new) for old, new in rename.items()}
    found = state_dicts(tree)
    weights = _weights(found, noise)
    unused = [old for old, (parts, _) in rules.items() if not any(w.begins(parts) for w in weights)]
    if unused:
        raise ConfigError(
            "checkpoint_parameters.init_rename",
            [f"{old!r} begins no name in {source}{_near(old, weights)}" for old in unused],
            f"The names there: {_listed(weights)}.",
        )
    ordered = sorted(rules.values(), key=lambda rule: -len(rule[0]))
    # What is left out must not count when it is asked what all the others lie in.
    weights = _weights(found, noise, ordered)
    model = models[0] if len(models) == 1 else None
    matched, taken = Matched(), dict[str, str]()
    for weight, renamed, target in _targets(weights, ordered, own, model):
        shown = weight.name + ("" if renamed == weight.name else f" (as {renamed})")
        if target not in own:
            if not weight.is_loose:
                matched.problems.append(f"{shown}: in the file, not in a model")
        elif target in taken:
            matched.problems.append(f"{shown}: stands for {target}, and so does {taken[target]}")
        else:
            taken[target] = shown
            matched.places[target] = weight.place
    return matched


def _targets(
    weights: Sequence[_Weight], rules: Sequence[_Rule], own: Collection[str], model: str | None
) -> Iterator[tuple[_Weight, str, str]]:
    """Each weight that is not left out, what it is renamed to, and the own name that this means.

    What one rule concerns is read in one way: as named in full, without names that all lie in, or
    as part of the only model; the way that finds most. Name by name, ``net.w`` of a model
    ``net`` that has a part ``net`` could mean either.
    """
    groups: dict[Any, list[tuple[_Weight, list[str]]]] = {}
    for weight in weights:
        rule, names = _renamed(weight, rules)
        if names:
            ways = [*names, *(f"{model}.{name}" for name in names if model is not None)]
            groups.setdefault((rule, weight.is_loose), []).append((weight, ways))
    for group in groups.values():
        counts = [
            sum(name in own for name in way) for way in zip(*(w for _, w in group), strict=True)
        ]
        chosen = counts.index(max(counts))
        for weight, ways in group:
            yield weight, ways[0], ways[chosen]


@dataclass(frozen=True)
class _Weight:
    parts: Parts
    num_optional: int
    """How many of the first parts may be left out."""
    place: TreePath
    is_loose: bool

    @property
    def name(self) -> str:
        return ".".join(self.parts)

    @property
    def variants(self) -> list[Parts]:
        return [self.parts[n:] for n in range(self.num_optional + 1)]

    def begins(self, prefix: Parts) -> bool:
        return any(variant[: len(prefix)] == prefix for variant in self.variants)


def _weights(
    found: Sequence[StateDict], noise: frozenset[str], rules: Sequence[_Rule] = ()
) -> list[_Weight]:
    kept: list[tuple[Parts, Parts, TreePath, bool]] = []
    for one in found:
        folder = _clean(".".join(one.folder), noise)
        for key, place in one.places.items():
            parts = (*folder, *_clean(key, noise))
            begun = (new for old, new in rules if old and parts[: len(old)] == old)
            if next(begun, "") is not None:
                kept.append((folder, parts, place, one.loose))
    folders = [folder for folder, _, _, is_loose in kept if not is_loose]
    agreeing = takewhile(lambda parts: len(set(parts)) == 1, zip(*folders, strict=False))
    num_common = len(list(agreeing))
    return [
        _Weight(parts, 0 if is_loose else num_common, place, is_loose)
        for _, parts, place, is_loose in kept
    ]


def _clean(name: str, noise: frozenset[str]) -> Parts:
    return tuple(part for part in name.split(".") if part and part not in noise)


def _renamed(weight: _Weight, rules: Sequence[_Rule]) -> tuple[_Rule | None, list[str]]:
    """The rule that concerns a weight, and what it may be called; nothing if it is left out."""
    for old, new in rules:
        # The empty prefix means the state dict itself, not what it lies in.
        for variant in weight.variants if old else weight.variants[-1:]:
            if variant[: len(old)] == old:
                rest = variant[len(old) :]
                return (old, new), [] if new is None else [".".join((new, *rest) if new else rest)]
    return None, [".".join(variant) for variant in weight.variants]


def _near(old: str, weights: Sequence[_Weight]) -> str:
    prefixes = {".".join(w.parts[:n]) for w in weights for n in range(1, len(w.parts) + 1)}
    near = difflib.get_close_matches(old, sorted(prefixes), n=2, cutoff=0.7)
    return f"; did you mean {' or '.join(repr(one) for one in near)}?" if near else ""


def _listed(weights: Sequence[_Weight]) -> str:
    names = [weight.name for weight in weights]
    rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (", ".join(names[:_SHOWN]) or "none") + rest
