from __future__ import annotations

import enum
from collections import OrderedDict, namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch

from dream_trainer.storage import join, split, tensor_leaves
from dream_trainer.storage.tree import merge

Pair = namedtuple("Pair", "left right")


class Colour(str, enum.Enum):
    RED = "red"


class Level(enum.IntEnum):
    HIGH = 3


def same(one: object, other: object) -> bool:
    """Equal to the bit, containers and types included."""
    if isinstance(one, torch.Tensor):
        return (
            isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
        )
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


TREES = {
    "empty": {},
    "plain": {"a": 1, "b": [True, None, 2.5, "x", b"y", 1j], "c": (1, (2,))},
    "tensor": torch.arange(3),
    "nested": {"m": {"w": torch.ones(2), "b": [torch.zeros(1), {"x": (torch.ones(()), 1)}]}},
    "int keys": {0: torch.ones(1), 1: {10: torch.zeros(2), "10x": 3}},
    "none beside a tensor": {"a": None, "b": torch.ones(1)},
    "containers that hold nothing": {"a": [], "b": (), "c": {}, "d": torch.ones(1)},
}


@pytest.mark.parametrize("name", TREES)
def test_merging_what_was_split_gives_the_tree_again(name: str) -> None:
    tree = TREES[name]
    skeleton, tensors = split(tree)
    assert same(merge(skeleton, tensors), tree)
    assert dict(tensor_leaves(tree)).keys() == tensors.keys()


def test_splitting_leaves_the_tree_as_it_is_and_shares_its_tensors() -> None:
    weight = torch.ones(2)
    tree = {"a": [weight, {"b": 1}]}
    _, tensors = split(tree)
    assert tree["a"][0] is weight
    assert tensors == {("a", 0): weight}


def test_every_leaf_that_is_not_plain_is_named_with_its_path() -> None:
    tree = {
        "optimizer": {"state": [1, Path("x")]},
        "fn": len,
        "callbacks": {"ema": {"module": object()}},
        "keys": {1.5: 1, ("a", "b"): 2},
        "ok": torch.ones(1),
    }
    with pytest.raises(TypeError) as caught:
        split(tree)
    lines = str(caught.value).splitlines()
    assert lines[1:-1] == [
        "  - optimizer.state.1 is a pathlib.PosixPath",
        "  - fn is a builtins.builtin_function_or_method",
        "  - callbacks.ema.module is a builtins.object",
        "  - keys has the key 1.5; keys are str or int",
        "  - keys has the key ('a', 'b'); keys are str or int",
    ]
    assert lines[-1] == "Store a str, number, list, dict or tensor instead."


@pytest.mark.parametrize(
    "value", [{Path("x")}, {torch.ones(1)}, {(1, Path("x"))}, frozenset({1}), range(3)], ids=repr
)
def test_what_could_not_be_loaded_again_is_refused_when_it_is_saved(value: object) -> None:
    with pytest.raises(TypeError, match=f"bad is a builtins.{type(value).__name__}"):
        split({"bad": value})


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (np.float64(0.5), 0.5),
        (Level.HIGH, 3),
        (Colour.RED, "red"),
        (OrderedDict(a=1), {"a": 1}),
        (Pair(1, 2), (1, 2)),
    ],
)
def test_subclasses_of_plain_types_become_the_plain_value(value: object, plain: object) -> None:
    skeleton, _ = split({"x": value})
    assert same(skeleton["x"], plain)


def test_a_path_is_joined_with_dots() -> None:
    assert join(("models", "net", 0, "weight")) == "models.net.0.weight"
