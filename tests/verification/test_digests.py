"""Equal digests are equal bits, and looking changes nothing."""

from __future__ import annotations

import random
import threading
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import TinyTrainer, differences, exact_state, tiny

from dream_trainer.callbacks import CallbackList
from dream_trainer.verification.digests import leaf, leaves
from dream_trainer.verification.observer import Observation, Observer, Place


def digest(value: Any, home: str | None = None) -> str | None:
    found = leaf(value, home)
    return None if found is None else found.digest


DIFFERENT = [
    0,
    False,
    0.0,
    -0.0,
    "0",
    b"0",
    None,
    [0],
    [[0]],
    {"a": 0},
    {"a": 1},
    {0},
    torch.zeros(()),
    torch.zeros(1),
    torch.zeros(1, dtype=torch.float64),
    torch.zeros(1, dtype=torch.bfloat16),
    torch.full((1,), -0.0),
    torch.zeros(0),
    torch.tensor([1 + 2j]),
    torch.tensor([1 - 2j]),
    np.zeros(1),
    np.zeros(1, dtype=np.float32),
]


def test_values_of_other_kind_shape_or_bits_have_other_digests() -> None:
    digests = [digest(value) for value in DIFFERENT]
    assert None not in digests
    assert len(set(digests)) == len(DIFFERENT)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (float("nan"), float("nan")),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ({1, 2, 3}, {3, 2, 1}),
        ([1, 2], (1, 2)),
        (deque([1]), [1]),
        (torch.arange(6).view(2, 3).T, torch.arange(6).view(2, 3).T.contiguous()),
        (torch.tensor([1 + 2j]).conj(), torch.tensor([1 - 2j])),
        (torch.eye(2).to_sparse(), torch.eye(2).to_sparse()),
        (random.Random(1), random.Random(1)),
        (np.random.default_rng(1), np.random.default_rng(1)),
        (np.random.RandomState(1), np.random.RandomState(1)),
        (torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)),
    ],
    ids=lambda value: type(value).__name__,  # addresses would differ between processes
)
def test_equal_values_have_equal_digests(one: Any, other: Any) -> None:
    assert digest(one) == digest(other) is not None


def test_a_generator_that_was_drawn_from_has_another_digest() -> None:
    for generator, draw in (
        (random.Random(1), random.Random.random),
        (np.random.default_rng(1), np.random.Generator.random),
        (np.random.RandomState(1), np.random.RandomState.rand),
        (torch.Generator().manual_seed(1), lambda g: torch.rand(1, generator=g)),
    ):
        before = digest(generator)
        assert digest(generator) == before
        draw(generator)  # type: ignore[operator]
        assert digest(generator) != before


class Box:
    def __init__(self, value: Any) -> None:
        self.value = value
        self.me = self


def test_objects_count_by_their_attributes_where_they_are_at_home() -> None:
    assert digest(Box(1)) is None
    home = Box.__module__.partition(".")[0]
    assert digest(Box(1), home) == digest(Box(1), home)
    assert digest(Box(1), home) != digest(Box(2), home)
    assert digest(threading.Lock()) is None
    assert digest([threading.Lock()]) == digest([threading.Lock()])


def test_leaves_go_by_dotted_path() -> None:
    tree = {"a": [1, {"b": torch.ones(2)}], "c": Box(3), "d": {}, "e": threading.Lock()}
    found = leaves(tree)
    assert found["a.0"].text == "1"
    assert found["a.1.b"].text == "float32 (2,), mean 1.0"
    assert found["c.value"].text == "3"
    assert found["d"].text == "{}"
    assert not [path for path in found if path.startswith("e")]


@pytest.mark.may_leave("rng")
def test_looking_at_a_run_does_not_change_it(tmp_path: Path) -> None:
    def run(name: str, seen: list[Observation] | None) -> Any:
        options = {"dropout": 0.3, "augment": True, "val_every_n_steps": 2, "max_steps": 8}
        trainer = tiny(tmp_path, TinyTrainer, experiment=name, **options)
        if seen is not None:
            own = {name: trainer.callbacks[name] for name in trainer.callbacks}
            trainer.callbacks = CallbackList({**own, "observer": Observer(seen.append)})
        trainer.fit()
        return trainer

    seen: list[Observation] = []
    plain, observed = run("plain", None), run("observed", seen)
    assert differences(exact_state(plain), exact_state(observed)) == []
    logs = [(t.run_directory / "metrics.jsonl").read_bytes() for t in (plain, observed)]
    assert logs[0] == logs[1]
    assert [one.place for one in seen] == [
        Place(0, 0, 0, in_epoch=False),
        *(Place(step, 0, step, in_epoch=True) for step in range(1, 7)),
        Place(6, 1, 6, in_epoch=False),
        Place(7, 1, 7, in_epoch=True),
        Place(8, 1, 8, in_epoch=True),
        Place(8, 1, 8, in_epoch=True, is_end=True),
    ]
    assert [one.num_validations for one in seen[-4:]] == [3, 3, 4, 4]
