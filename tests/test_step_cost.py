"""What a step costs: reported here, measured by ``nox -s bench -- steps``."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from dream_trainer import metrics
from dream_trainer.randomness import preserved

BENCHMARKS = Path(__file__).parent / "benchmarks"


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """The loops of the benchmarks."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.chdir(tmp_path)
    import training

    with preserved():  # other tools leave the generators seeded
        yield training
    del sys.modules["training"]


def test_a_bare_step_adds_less_than_a_loop_by_hand_on_fabric(training: Any) -> None:
    """The promise is half of it; this fails past twice the promise, in three tries of a second."""
    names = (training.PLAIN, training.FABRIC, training.OURS)
    share = float("inf")
    for _ in range(3):
        fastest = {
            name: min(
                training.microseconds_of_a_batch(name, training.Scenario("guard"), 50, 200)
                for _ in range(4)
            )
            for name in names
        }
        plain, fabric, ours = fastest.values()
        share = min(share, (ours - plain) / max(fabric - plain, 1.0))
        if share <= 1.0:
            break
    print(f"a bare step adds {share:.2f} of what Fabric by hand adds")
    assert share <= 1.0


class Counted(list[Any]):
    """Batches; the profiler watches those in the middle."""

    def __init__(self, batch: Any) -> None:
        super().__init__([batch] * 30)
        self.profiler = profile(activities=[ProfilerActivity.CPU])

    def __getitem__(self, index: Any) -> Any:
        if index == 10:
            self.profiler.__enter__()
        elif index == 20:
            self.profiler.__exit__(None, None, None)
        return super().__getitem__(index)

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))


@pytest.mark.parametrize("tool", ["OURS", "OURS_AS_IT_IS"])
def test_no_step_waits_for_a_value(
    training: Any, tool: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As if it were on an accelerator, whose values are read when rows are written.
    monkeypatch.setattr(metrics, "_is_read_at_once", lambda value: False)
    counts = {}
    for name in (training.FABRIC, getattr(training, tool)):
        batches = Counted(training.Batches(0, 1).batch)
        training.TOOLS[name](training.Scenario("counted", clip=1.0), batches)
        events = Counter(event.key for event in batches.profiler.events())
        counts[name] = events["aten::item"] + events["aten::_local_scalar_dense"]
        assert events["aten::linear"] == 20
    assert counts[getattr(training, tool)] <= counts[training.FABRIC] == 0
    assert torch.is_grad_enabled()
