"""Profiler: traces of chosen steps, without a difference to the run."""

from __future__ import annotations

import gzip
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from support import TinyTrainer, differences, exact_state, run_ranks, tiny

from dream_trainer import Callback, Profiler
from dream_trainer.coordination import Interrupted
from dream_trainer.errors import ConfigError


def files(root: Path) -> list[str]:
    return sorted(path.name for path in root.glob("default/default/tiny/profile/*"))


def events(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        return list(json.load(file)["traceEvents"])


def steps_in(path: Path) -> int:
    names = {one["name"] for one in events(path) if one.get("name", "").startswith("ProfilerStep#")}
    return len(names)


class At(Callback):
    def __init__(self, step: int, error: type[BaseException]) -> None:
        self.step, self.error = step, error

    def post_train_step(self, trainer: Any, result: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            if self.error is Interrupted:
                os.kill(os.getpid(), signal.SIGINT)
            else:
                raise self.error


def test_a_schedule_counts_optimizer_steps_of_the_run(tmp_path: Path) -> None:
    profiler = Profiler(wait=1, warmup=1, active=2, repeat=2)
    tiny(tmp_path, callbacks={"profiler": profiler}).fit()  # 12 steps
    assert files(tmp_path) == [
        "step-00000002-rank-0.pt.trace.json.gz",
        "step-00000002-rank-0.txt",
        "step-00000006-rank-0.pt.trace.json.gz",
        "step-00000006-rank-0.txt",
    ]
    assert [steps_in(path) for path in profiler.traces] == [2, 2]
    named = {one.get("name") for one in events(profiler.traces[0])}
    assert "aten::addmm" in named
    assert "Self CPU" in profiler.traces[0].with_name("step-00000002-rank-0.txt").read_text()


def test_steps_are_those_asked_for_and_one_may_be_the_first(tmp_path: Path) -> None:
    profiler = Profiler(at_steps=[7, 0], active=1, compress=False)
    tiny(tmp_path, callbacks={"profiler": profiler}).fit()
    assert [path.name for path in profiler.traces] == [
        "step-00000000-rank-0.pt.trace.json",
        "step-00000007-rank-0.pt.trace.json",
    ]
    # A recording that warms up first knows its steps by name; one that does not, from the second.
    assert "aten::addmm" in {one.get("name") for one in events(profiler.traces[0])}


def test_shapes_memory_and_stacks_are_in_the_trace_if_asked_for(tmp_path: Path) -> None:
    profiler = Profiler(
        at_steps=[3], active=1, record_shapes=True, profile_memory=True, with_stack=True
    )
    tiny(tmp_path, callbacks={"profiler": profiler}).fit()
    (path,) = profiler.traces
    found = events(path)
    assert any("Input Dims" in one.get("args", {}) for one in found)
    assert any(one.get("name") == "[memory]" for one in found)
    assert any(one.get("cat") == "python_function" for one in found)


def test_accumulation_and_several_steps_a_batch_are_steps_too(tmp_path: Path) -> None:
    class Thrice(TinyTrainer):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            for _ in range(3):
                loss = self.compute_loss(batch, batch_idx)
                self.backward(loss)
                self.step()
            return loss

    profiler = Profiler(wait=0, warmup=2, active=1, repeat=3)
    tiny(tmp_path, kind=Thrice, callbacks={"profiler": profiler}, n_epochs=1).fit()
    # Steps 2, 5 and 8 lie inside of batches that begin at 0, 3 and 6: there is nothing to keep.
    assert profiler.traces == []
    accumulating = Profiler(at_steps=[1], active=1)
    options = {"gradient_accumulation_steps": 3, "n_epochs": 1, "experiment": "accumulating"}
    tiny(tmp_path, callbacks={"profiler": accumulating}, **options).fit()
    (path,) = accumulating.traces
    forwards = [one for one in events(path) if one.get("name") == "aten::addmm"]
    assert len(forwards) >= 3 * 2  # two layers, three batches


def test_a_run_is_the_same_to_the_bit_with_it_and_without(tmp_path: Path) -> None:
    options = {"dropout": 0.3, "augment": True}
    plain = tiny(tmp_path / "plain", **options)
    plain.fit()
    profiler = Profiler(wait=1, warmup=1, active=2, repeat=0, record_shapes=True)
    profiled = tiny(tmp_path / "profiled", callbacks={"profiler": profiler}, **options)
    profiled.fit()
    assert profiler.traces
    assert differences(exact_state(plain), exact_state(profiled)) == []
    logs = [
        (root / "default/default/tiny/metrics.jsonl").read_bytes()
        for root in (tmp_path / "plain", tmp_path / "profiled")
    ]
    assert logs[0] == logs[1]


@pytest.mark.parametrize("error", [ZeroDivisionError, Interrupted])
def test_an_end_in_the_middle_stops_it_and_a_restart_overwrites_nothing(
    tmp_path: Path, error: type[BaseException]
) -> None:
    def profiler() -> Profiler:
        return Profiler(wait=0, warmup=1, active=3, repeat=0)

    first, ending = profiler(), At(7, error)
    # Saved after 4 steps last: steps 1 to 3 were profiled, 5 to 7 are cut short.
    options: dict[str, Any] = {"every_n_steps": 4, "every_n_epochs": None, "on_interrupt": False}
    trainer = tiny(tmp_path, callbacks={"profiler": first, "ending": ending}, **options)
    with pytest.raises(error):
        trainer.fit()
    assert not torch.autograd.profiler.kineto_available() or not torch.autograd._profiler_enabled()
    before = files(tmp_path)
    assert before == ["step-00000001-rank-0.pt.trace.json.gz", "step-00000001-rank-0.txt"]
    content = first.traces[0].read_bytes()

    second = profiler()
    tiny(tmp_path, callbacks={"profiler": second}, **options).fit()
    assert [path.name for path in second.traces] == [
        "step-00000005-start-2-rank-0.pt.trace.json.gz",
        "step-00000009-start-2-rank-0.pt.trace.json.gz",
    ]
    assert first.traces[0].read_bytes() == content


def test_nothing_is_written_where_the_run_writes_nothing(tmp_path: Path) -> None:
    profiler = Profiler(wait=0, warmup=0, active=1)
    tiny(tmp_path, callbacks={"profiler": profiler}, enable=False).fit()
    assert profiler.traces == []
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_ends_no_run(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    profiler = Profiler(at_steps=[2], active=1, folder=tmp_path / "taken")
    trainer = tiny(tmp_path, callbacks={"profiler": profiler})
    with pytest.warns(RuntimeWarning, match="the profile of step 2 cannot be written"):
        trainer.fit()
    assert trainer.global_step == 12


def test_numbers_that_cannot_work_are_told_together() -> None:
    with pytest.raises(ConfigError) as caught:
        Profiler(wait=-1, active=3, at_steps=[4, 6, -2])
    assert str(caught.value) == (
        "Profiler:\n"
        "  - wait is -1, and must not be below 0\n"
        "  - at_steps has -2; the first step is 0\n"
        "  - at_steps has 4 and 6, with active=3 steps from each"
    )


def profiled(root: Path, ranks: tuple[int, ...] | None) -> list[str]:
    profiler = Profiler(at_steps=[2], active=1, ranks=ranks)
    trainer = tiny(root, callbacks={"profiler": profiler}, devices=2, dp_shard=2)
    trainer.fit()
    return [path.name for path in profiler.traces]


@pytest.mark.distributed
def test_every_rank_writes_its_own_or_those_that_are_named(tmp_path: Path) -> None:
    name = "step-00000002{}-rank-{}.pt.trace.json.gz"
    assert run_ranks(2, profiled, tmp_path, None) == [[name.format("", r)] for r in (0, 1)]
    # A run that goes on has no step 2 any more; one of another name does.
    assert run_ranks(2, profiled, tmp_path / "other", (1,)) == [[], [name.format("", 1)]]
