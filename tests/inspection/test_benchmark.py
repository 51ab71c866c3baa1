"""benchmark and profile_run: a few steps of a trainer, thrown away."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
from support import Points, TinyTrainer, run_ranks, tiny, tiny_config
from torch.utils.data import DataLoader

from dream_trainer import Callback, benchmark, profile_run
from dream_trainer.errors import ConfigError

#: Batches that a loader has made, of all trainers of this process.
MADE: list[int] = []


class CountedPoints(Points):
    def __getitem__(self, index: int) -> Any:
        MADE.append(index)
        return super().__getitem__(index)


class Counting(TinyTrainer):
    def configure_dataloaders(self) -> Any:
        data = CountedPoints(self.config.num_samples)
        return DataLoader(data, batch_size=self.config.batch_size), None


class Remembering(Callback):
    def __init__(self) -> None:
        self.steps: list[int] = []
        self.lock = threading.Lock()  # which cannot be copied

    def post_train_step(self, trainer: Any, result: Any, batch: Any, batch_idx: int) -> None:
        self.steps.append(trainer.global_step)


def test_steps_and_samples_are_counted_and_nothing_is_left(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, gradient_accumulation_steps=2, n_epochs=1)
    before = repr(config)
    began = time.perf_counter()
    found = benchmark(TinyTrainer, config, steps=8, warmup=3)
    assert 0 < found.seconds < time.perf_counter() - began
    assert (found.steps, found.ranks, found.device) == (8, 1, "cpu")
    # Eight samples a step; an epoch of 24 samples is three steps.
    assert found.samples == 8 * 8
    assert found.samples_per_second == pytest.approx(8 * found.steps_per_second)
    assert repr(config) == before
    assert list(tmp_path.iterdir()) == []


def test_a_cached_batch_is_loaded_once(tmp_path: Path) -> None:
    MADE.clear()
    found = benchmark(Counting, tiny_config(tmp_path), steps=20, warmup=1, cached_batch=True)
    assert found.is_cached
    assert found.samples == 20 * 4
    assert len(MADE) == 4
    MADE.clear()
    benchmark(Counting, tiny_config(tmp_path), steps=20, warmup=1)
    assert len(MADE) == 21 * 4


def test_a_run_on_disk_is_not_touched(tmp_path: Path) -> None:
    trainer = tiny(tmp_path, max_steps=4)
    trainer.fit()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    benchmark(TinyTrainer, trainer.config, steps=2, warmup=0)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_callbacks_of_the_configuration_run_along(tmp_path: Path) -> None:
    class Writing(Remembering):
        def post_fit(self, trainer: Any) -> None:
            (trainer.run_directory / "steps.txt").write_text(str(self.steps))

    remembering = Writing()
    config = tiny_config(tmp_path, callbacks={"mine": remembering})
    benchmark(TinyTrainer, config, steps=2, warmup=1)
    assert remembering.steps == [1, 2, 3]
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_ends_too_early_says_so(tmp_path: Path) -> None:
    class Stopping(TinyTrainer):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.stop("enough")
            return super().training_step(batch, batch_idx)

    with pytest.raises(ConfigError, match="ended after 1 steps: enough"):
        benchmark(Stopping, tiny_config(tmp_path))


def test_what_cannot_work_is_told_together(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"steps is 0.*\n.*warmup is -1"):
        benchmark(TinyTrainer, tiny_config(tmp_path), steps=0, warmup=-1)
    with pytest.raises(ConfigError, match="it returned a int"):
        benchmark(lambda config: 3, tiny_config(tmp_path))  # type: ignore[arg-type, return-value]


def test_a_profile_has_phases_operations_and_a_trace(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "runs")
    found = profile_run(TinyTrainer, config, tmp_path / "out", steps=2, warmup=6)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "step-00000006-rank-0.pt.trace.json.gz",
        "step-00000006-rank-0.txt",
    ]
    assert not (tmp_path / "runs").exists()
    assert found.trace.is_file()
    phases = {one.phase: one.steps for one in found.phases}
    # Six steps, without three at first and two in which the profiler warms up.
    assert phases["training_step"] == phases["step"] == 1
    told = str(found)
    assert "training_step (forward, loss)" in told
    assert "aten::" in told
    assert "ui.perfetto.dev" in told
    again = profile_run(TinyTrainer, config, tmp_path / "out", steps=2, warmup=6)
    assert again.trace.name == "step-00000006-start-2-rank-0.pt.trace.json.gz"


def on_ranks(root: Path) -> tuple[Any, ...]:
    config = tiny_config(root, devices=2, dp_shard=2)
    timed = benchmark(TinyTrainer, config, steps=4, warmup=1)
    profiled = profile_run(TinyTrainer, config, root / "profile", steps=1, warmup=2)
    return timed.samples, timed.ranks, profiled.trace.name


@pytest.mark.distributed
def test_ranks_work_together_and_samples_count_over_all(tmp_path: Path) -> None:
    name = "step-00000002-rank-{}.pt.trace.json.gz"
    expected = [(4 * 4 * 2, 2, name.format(rank)) for rank in (0, 1)]
    assert run_ranks(2, on_ranks, tmp_path) == expected
