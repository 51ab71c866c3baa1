"""Random generators that objects keep to themselves: found, seeded, saved and put back."""

from __future__ import annotations

import functools
import random
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FunctionType, MethodType, ModuleType
from typing import Any, TypeAlias

import numpy as np
import torch

from dream_trainer.randomness import derive

OwnGenerator: TypeAlias = (
    random.Random | np.random.Generator | np.random.RandomState | torch.Generator
)
#: The kinds of generators that are known.
GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)
_GLOBAL = (
    random.random.__self__,  # type: ignore[attr-defined]
    np.random.rand.__self__,  # type: ignore[attr-defined]
    torch.default_generator,
)
_LEAVES = (str, bytes, int, float, complex, type, ModuleType, torch.Tensor, np.ndarray, np.generic)

#: Longer lists and dicts are data and no parts; more objects are looked at by nobody in time.
MAX_ENTRIES, MAX_OBJECTS = 256, 5_000


def reachable(*owners: Any, apart: tuple[type, ...] = ()) -> Iterator[Any]:
    """Objects, and what they hold in attributes, short lists and dicts, and closures.

    Nearest first, in the order of the attributes, so the same in every process. No property or
    other code of the objects runs.

    Args:
        owners: where to begin.
        apart: types whose objects are given, but not looked into.
    """
    seen: dict[int, Any] = {}  # holds them: an id must not be used again
    queue = deque(owners)
    while queue and len(seen) < MAX_OBJECTS:
        thing = queue.popleft()
        if thing is None or isinstance(thing, _LEAVES) or id(thing) in seen:
            continue
        seen[id(thing)] = thing
        yield thing
        if not isinstance(thing, (*GENERATORS, *apart)):
            queue.extend(_parts(thing))


def own_generators(*owners: Any, apart: tuple[type, ...] = ()) -> list[OwnGenerator]:
    """The generators among what is `reachable`, without the global ones."""
    return [
        thing
        for thing in reachable(*owners, apart=apart)
        if isinstance(thing, GENERATORS)
        and not isinstance(thing, random.SystemRandom)
        and not any(thing is one for one in _GLOBAL)
    ]


def seed_generators(generators: Sequence[OwnGenerator], seed: int) -> None:
    """Give each generator a seed of its own, fixed by ``seed`` and its place."""
    for place, generator in enumerate(generators):
        number = derive(seed, place)
        if isinstance(generator, torch.Generator):
            generator.manual_seed(number)
        elif isinstance(generator, np.random.Generator):
            _seed_bits(generator.bit_generator, number)
        elif isinstance(generator, np.random.RandomState):
            generator.seed(number & 0xFFFFFFFF)
        else:
            generator.seed(number)


@contextmanager
def preserved_generators(generators: Sequence[OwnGenerator]) -> Iterator[None]:
    """Leave generators after the block as they were before it."""
    states = [generator_state(generator) for generator in generators]
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            set_generator_state(generator, state)


def _seed_bits(bits: Any, seed: int) -> None:
    kind = type(bits)
    if kind not in (np.random.PCG64, np.random.PCG64DXSM):
        bits.state = kind(seed).state
        return
    # What default_rng gives. Making one, as for the others, takes as long as ten such seeds.
    state = derive(seed, 0) << 64 | derive(seed, 1)
    increment = derive(seed, 2) << 64 | derive(seed, 3) | 1  # must be odd
    bits.state = {
        "bit_generator": kind.__name__,
        "state": {"state": state, "inc": increment},
        "has_uint32": 0,
        "uinteger": 0,
    }


def generator_state(generator: OwnGenerator) -> Any:
    """Its state, in its own form."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    if isinstance(generator, np.random.RandomState):
        return generator.get_state(legacy=False)
    return generator.getstate()


def set_generator_state(generator: OwnGenerator, state: Any) -> None:
    """The inverse of `generator_state`."""
    if isinstance(generator, torch.Generator | np.random.RandomState):
        generator.set_state(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    else:
        generator.setstate(state)


def _parts(thing: Any) -> list[Any]:
    kind: Any
    for kind in (dict, list, tuple):
        if isinstance(thing, kind):  # a subclass of the user's may read a file in __iter__
            if kind.__len__(thing) > MAX_ENTRIES:
                return []
            return list(dict.values(thing) if kind is dict else kind.__iter__(thing))
    if isinstance(thing, functools.partial):
        return [thing.func, thing.args, thing.keywords]
    if isinstance(thing, MethodType):
        return [thing.__self__, thing.__func__]
    if isinstance(thing, FunctionType):
        return [*_cells(thing), thing.__defaults__, thing.__kwdefaults__]
    try:
        attributes = list(object.__getattribute__(thing, "__dict__").values())
    except (AttributeError, TypeError):
        attributes = []
    return attributes + _slots(thing)


def _cells(function: FunctionType) -> list[Any]:
    found = []
    for cell in function.__closure__ or ():
        try:
            found.append(cell.cell_contents)
        except ValueError:  # a name that is not bound yet
            continue
    return found


def _slots(thing: Any) -> list[Any]:
    found = []
    for kind in type(thing).__mro__:
        names = vars(kind).get("__slots__", ())
        for name in (names,) if isinstance(names, str) else names:
            slot: Any = vars(kind).get(name)
            if hasattr(slot, "__objclass__"):
                try:
                    found.append(slot.__get__(thing))
                except AttributeError:  # never assigned
                    continue
    return found
