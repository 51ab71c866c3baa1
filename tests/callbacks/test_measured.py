"""What clocks and meters say goes to the timeline and the loggers, never into the exact log."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch._dynamo.utils
from support import TinyTrainer, differences, exact_state, run_ranks, tiny
from torch import nn

from dream_trainer import Callback, MemoryMonitor, Throughput, Timeline
from dream_trainer.callbacks.flops import FlopCount, known_peak
from dream_trainer.callbacks.memory_monitor import process_bytes
from dream_trainer.errors import ConfigError

pytestmark = pytest.mark.may_leave("rng")

#: Of a batch of 4 through ``mlp``: forward, and backward without the gradient of the input.
FLOPS = 2 * 4 * (3 * 8 + 8 * 1) + 2 * 4 * (3 * 8 + 2 * 8 * 1)


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    """Whatever other tests have compiled in this process."""
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


class Recording:
    """A logger."""

    def __init__(self) -> None:
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))

    def finalize(self, status: str) -> None:
        pass


class Second:
    """A clock on which a second passes at each look."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


def measured_run(
    root: Path, kind: type[TinyTrainer] = TinyTrainer, **options: Any
) -> tuple[Any, list[dict[str, Any]], Recording]:
    """A trainer that has run, its lines of progress, and what a logger got."""
    logger = Recording()
    callbacks = {"timeline": Timeline(1e9, stopwatch=Second()), **options.pop("callbacks", {})}
    options = {"n_epochs": 1, "has_validation": False} | options
    trainer = tiny(root, kind, callbacks=callbacks, loggers={"one": logger}, **options)
    trainer.fit()
    text = (trainer.run_directory / "timeline.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    return trainer, [line for line in lines if line["event"] == "progress"], logger


class Weighted(TinyTrainer):
    """Two tokens a sample."""

    def compute_loss(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": super().compute_loss(batch, batch_idx), "weight": 2 * len(batch["x"])}


def test_throughput_is_over_the_time_of_training_and_loading(tmp_path: Path) -> None:
    callbacks = {"throughput": Throughput(peak_flops=1e6)}
    _, (line,), logger = measured_run(tmp_path, Weighted, callbacks=callbacks)
    seconds = line["seconds"]["train"] + line["seconds"]["loader"]
    expected = {
        "samples_per_second": 24 / seconds,
        "batches_per_second": 6 / seconds,
        "steps_per_second": 6 / seconds,
        "tokens_per_second": 48 / seconds,
        "mfu": FLOPS * 6 / seconds / 1e6,
    }
    wait = {"loader_wait": line["seconds"]["loader"] / seconds}
    assert line["measured"] == pytest.approx(expected | wait, rel=1e-4)
    (step, values) = logger.rows[-1]
    assert step == 6
    assert values == pytest.approx({f"throughput/{k}": v for k, v in expected.items()}, rel=1e-4)


def test_tokens_are_counted_by_a_function_of_ones_own(tmp_path: Path) -> None:
    callbacks = {"throughput": Throughput(tokens=lambda batch: torch.tensor(batch["x"].numel()))}
    _, (line,), _ = measured_run(tmp_path, callbacks=callbacks, gradient_accumulation_steps=3)
    measured = line["measured"]
    assert measured["tokens_per_second"] == pytest.approx(3 * measured["samples_per_second"], 1e-4)
    assert measured["batches_per_second"] == pytest.approx(3 * measured["steps_per_second"], 1e-4)
    assert "mfu" not in measured  # nobody knows what this processor can do


@pytest.mark.distributed
@pytest.mark.parametrize("sharded", [False, True])
def test_samples_and_tokens_are_those_of_all_ranks(tmp_path: Path, sharded: bool) -> None:
    def rank() -> list[dict[str, Any]]:
        layout = {"dp_shard": 2, "dp_replicate": 1} if sharded else {}
        callbacks = {"throughput": Throughput(peak_flops=1e6), "memory": MemoryMonitor()}
        options = {"n_epochs": 1, "has_validation": False, **layout}
        trainer, lines, _ = measured_run(tmp_path, Weighted, callbacks=callbacks, **options)
        bare = tiny(tmp_path, Weighted, experiment="bare", **options)
        bare.fit()
        assert differences(exact_state(trainer), exact_state(bare)) == []
        return lines

    lines, _ = run_ranks(2, rank)
    measured = lines[-1]["measured"]
    assert measured["tokens_per_second"] == pytest.approx(2 * measured["samples_per_second"], 1e-4)
    batches = measured["batches_per_second"]
    assert measured["samples_per_second"] == pytest.approx(8 * batches, 1e-4)
    assert measured["mfu"] == pytest.approx(FLOPS * batches / 1e6, 1e-4)
    assert measured["memory/process_gib"] > 0


class Everything(nn.Module):
    """Layers with kernels of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 4, 3, padding=1)
        self.norm = nn.LayerNorm(4)
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.1, batch_first=True)
        self.gru = nn.GRU(4, 4, batch_first=True)
        self.out = nn.Sequential(nn.BatchNorm1d(12), nn.GELU(), nn.Dropout(0.2), nn.Linear(12, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.conv(x.unsqueeze(1)).transpose(1, 2))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.out(self.gru(x)[0].flatten(1))


class Layers(TinyTrainer):
    def configure_models(self) -> None:
        self.net = Everything()


def test_counting_operations_changes_nothing_of_a_run(tmp_path: Path) -> None:
    counted, (line,), _ = measured_run(
        tmp_path, Layers, callbacks={"throughput": Throughput(peak_flops=1e6)}
    )
    assert line["measured"]["mfu"] > 0
    bare = tiny(tmp_path, Layers, experiment="bare", n_epochs=1, has_validation=False)
    bare.fit()
    assert differences(exact_state(counted), exact_state(bare)) == []
    logs = [(one.run_directory / "metrics.jsonl").read_bytes() for one in (counted, bare)]
    assert logs[0] == logs[1]


class Compiled(TinyTrainer):
    """Its loss is compiled, which no look at the modules shows."""

    def configure_models(self) -> None:
        super().configure_models()
        self.calls = 0

        def backend(graph: Any, inputs: Any) -> Any:
            def run(*arguments: Any) -> Any:
                self.calls += 1
                return graph(*arguments)

            return run

        self.loss_of = torch.compile(lambda p, y: (p - y).square().mean(), backend=backend)

    def compute_loss(self, batch: Any, batch_idx: int) -> Any:
        return self.loss_of(self.net(batch["x"]), batch["y"])


def test_what_is_compiled_stays_compiled(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="cannot count what torch.compile makes"):
        trainer, (line,), _ = measured_run(
            tmp_path, Compiled, callbacks={"throughput": Throughput(peak_flops=1e6)}
        )
    assert trainer.calls == 6
    assert "mfu" not in line["measured"]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Throughput")
        given = Throughput(peak_flops=1e6, flops_per_batch=1e3)
        _, lines, _ = measured_run(
            tmp_path, Compiled, experiment="given", callbacks={"throughput": given}
        )
    assert lines[-1]["measured"]["mfu"] > 0


class Failing(TinyTrainer):
    def compute_loss(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 1:
            raise ZeroDivisionError
        return super().compute_loss(batch, batch_idx)


def test_an_error_while_operations_are_counted_leaves_no_counter_behind(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        measured_run(tmp_path, Failing, callbacks={"throughput": Throughput(peak_flops=1e6)})
    assert torch._C._len_torch_dispatch_stack() == 0


@pytest.mark.distributed
def test_a_layer_that_is_split_counts_its_own_part() -> None:
    def rank() -> float:
        from torch import distributed
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor.parallel import (
            ColwiseParallel,
            RowwiseParallel,
            parallelize_module,
        )

        distributed.init_process_group("gloo")
        net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        plan: Any = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        parallelize_module(net, init_device_mesh("cpu", (2,)), plan)
        with FlopCount(tp_size=2) as count:  # type: ignore[no-untyped-call]
            net(torch.randn(4, 8)).sum().backward()
        return float(count.flops)

    products = 2 * 4 * 8 * 16
    assert run_ranks(2, rank) == [(2 * products + 3 * products) / 2] * 2


def test_peaks_are_found_by_whole_words() -> None:
    assert known_peak("NVIDIA H100 80GB HBM3", "bf16") == 989.4e12
    assert known_peak("NVIDIA H100 PCIe", "bf16") == 756.5e12
    assert known_peak("NVIDIA A100-SXM4-80GB", "tf32") == 156e12
    assert known_peak("NVIDIA L4", "fp16") == 121e12
    assert known_peak("NVIDIA L40", "fp16") is None
    assert known_peak("Tesla V100-SXM2-16GB", "bf16") is None
    assert known_peak("NVIDIA GeForce RTX 4090", "fp32") == 82.6e12
    assert known_peak("NVIDIA GeForce RTX 4090 Laptop GPU", "fp32") is None


def test_numbers_of_throughput_are_above_zero() -> None:
    with pytest.raises(ConfigError, match=r"(?s)flops_per_batch=0 .*peak_flops=-1 "):
        Throughput(flops_per_batch=0, peak_flops=-1)


def test_the_memory_of_a_process_is_what_the_system_says() -> None:
    found = process_bytes()
    assert found is not None
    assert found == pytest.approx(psutil.Process().memory_info().rss, rel=0.05)


class Meter(Callback):
    """Measures something of its own, twice a step."""

    def post_train_step(self, trainer: Any, result: Any, batch: Any, batch_idx: int) -> None:
        trainer.log_measured("meter/mean", batch_idx)
        trainer.log_measured("meter/max", torch.tensor(float(batch_idx)), reduce="max")


def test_what_anybody_measures_goes_the_same_way(tmp_path: Path) -> None:
    trainer, (line,), logger = measured_run(tmp_path, callbacks={"meter": Meter()})
    assert line["measured"]["meter/mean"] == 2.5
    assert line["measured"]["meter/max"] == 5
    assert logger.rows[-1] == (6, {"meter/mean": 2.5, "meter/max": 5})
    exact = (trainer.run_directory / "metrics.jsonl").read_text(encoding="utf-8")
    assert "meter" not in exact
    assert trainer.measured.take(1.0) == {}


def test_loggers_get_nothing_that_nobody_asked_for(tmp_path: Path) -> None:
    trainer, (line,), logger = measured_run(tmp_path)
    assert list(line["measured"]) == ["loader_wait", "samples_per_second"]
    rows = (trainer.run_directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(logger.rows) == len(rows)


def test_what_is_measured_and_taken_by_nobody_is_told(tmp_path: Path) -> None:
    alone = {"timeline": None, "memory": MemoryMonitor()}
    with pytest.warns(UserWarning, match=r"nobody takes what is measured \(memory\)"):
        tiny(tmp_path, callbacks=alone, enable=False).fit()
