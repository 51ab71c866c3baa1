"""What a step costs: reported here, measured by ``nox -s bench -- steps``."""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import run_ranks
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader

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
        super().__init__([batch] * 60)  # two ranks of a divided loader get 30
        self.profiler: Any = profile(activities=[ProfilerActivity.CPU])
        self._num_read = 0

    def __getitem__(self, index: Any) -> Any:
        if self._num_read == 10:
            self.profiler.__enter__()
        elif self._num_read == 20:
            self.profiler.__exit__(None, None, None)
        self._num_read += 1
        return super().__getitem__(index)

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))


def watched(
    training: Any, tool: str, scenario: Any, loader: Callable[[Any], Any] = lambda batches: batches
) -> Counter[str]:
    """Events of ten batches in the loop of a tool."""
    batches = Counted(training.Batches(0, 1).batch)
    training.TOOLS[tool](scenario, loader(batches))
    events = Counter(event.key for event in batches.profiler.events())
    assert events["aten::linear"] == 20
    return events


def reads(events: Counter[str]) -> int:
    """How often the host waits for a value."""
    return events["aten::item"] + events["aten::_local_scalar_dense"]


def collectives(events: Counter[str]) -> dict[str, int]:
    """By name, of ten batches."""
    return {name: count for name, count in events.items() if name.startswith("c10d::")}


@pytest.mark.parametrize("tool", ["OURS", "OURS_AS_IT_IS"])
def test_no_step_waits_for_a_value(
    training: Any, tool: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As if it were on an accelerator, whose values are read when rows are written.
    monkeypatch.setattr(metrics, "_is_read_at_once", lambda value: False)
    scenario = training.Scenario("counted", clip=1.0)
    assert reads(watched(training, training.FABRIC, scenario)) == 0
    assert reads(watched(training, getattr(training, tool), scenario)) == 0
    assert torch.is_grad_enabled()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no accelerator here")
@pytest.mark.parametrize("tool", ["OURS", "OURS_AS_IT_IS"])
def test_no_step_on_an_accelerator_synchronises(training: Any, tool: str) -> None:
    """torch raises at whatever would wait for the device."""
    scenario = training.Scenario("counted", accelerator="cuda")
    batches = Counted([part.cuda() for part in training.Batches(0, 1).batch])
    batches.profiler = Synchronising()
    training.TOOLS[getattr(training, tool)](scenario, batches)
    assert torch.cuda.get_sync_debug_mode() == 0


class Synchronising:
    """In place of the profiler: in the block, waiting for the device is an error."""

    def __enter__(self) -> None:
        torch.cuda.set_sync_debug_mode("error")

    def __exit__(self, *error: object) -> None:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.distributed
@pytest.mark.parametrize("options", [{}, {"accumulate": 5}, {"clip": 1.0}], ids=str)
def test_a_step_on_ranks_has_the_collectives_of_fabrics_and_no_other(
    training: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "_is_read_at_once", lambda value: False)
    scenario = training.Scenario("counted", ranks=2, **options)

    def rank() -> list[tuple[dict[str, int], int]]:
        dist.init_process_group("gloo")
        tools = (training.FABRIC, training.OURS, training.OURS_AS_IT_IS)
        found = [watched(training, tool, scenario) for tool in tools]
        divided = functools.partial(DataLoader, batch_size=None)
        found.append(watched(training, training.OURS, scenario, divided))
        return [(collectives(events), reads(events)) for events in found]

    for by_hand, *ours in run_ranks(2, rank):
        expected = {"c10d::allreduce_": 2 if "accumulate" in options else 10}
        assert by_hand == (expected, 0)
        assert ours == [by_hand] * 3
