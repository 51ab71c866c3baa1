"""Batches grow until a rank has no memory left; all ranks hear of it, and nobody waits."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from support import TinyConfig, TinyTrainer, run_ranks, tiny_config
from torch.utils.data import DataLoader

from dream_trainer import SWA, Callback, EarlyStopping, Schedule, find_batch_size
from dream_trainer.configs import DeviceParameters
from dream_trainer.errors import ConfigError
from dream_trainer.tuning import BatchSizeResult, Trial
from dream_trainer.tuning.size_search import sizes_to_try


class Limited(TinyTrainer):
    """As if there was no room for more than 11 samples."""

    most = 11

    def compute_loss(self, batch: Any, batch_idx: int) -> Any:
        if len(batch["x"]) > self.most:
            raise torch.OutOfMemoryError(f"tried to allocate for {len(batch['x'])} samples")
        return super().compute_loss(batch, batch_idx)


def config_of(root: Path, **options: Any) -> TinyConfig:
    return tiny_config(root, **{"num_samples": 400, "batch_size": 2} | options)


def sizes_of(result: BatchSizeResult) -> list[tuple[int, bool]]:
    return [(trial.size, trial.fits) for trial in result.trials]


def search(limit: int, start: int, mode: Any = "binsearch", max_size: int | None = None) -> Any:
    """The sizes that are tried where so many fit, and the largest."""
    found, tried = sizes_to_try(start, mode, max_size), []
    try:
        size = next(found)
        while True:
            tried.append(size)
            size = found.send(size <= limit)
    except StopIteration as end:
        return tried, end.value


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((11, 2), ([2, 4, 8, 16, 12, 10, 11], 11)),
        ((11, 2, "power"), ([2, 4, 8, 16], 8)),
        ((11, 64), ([64, 32, 16, 8, 12, 10, 11], 11)),
        ((100, 8, "binsearch", 50), ([8, 16, 32, 50], 50)),
        ((100, 64, "binsearch", 50), ([50], 50)),
        ((1000, 512), ([512, 1024, 768, 896, 960, 992], 992)),
        ((0, 4), ([4, 2, 1], None)),
    ],
)
def test_the_search(arguments: Any, expected: Any) -> None:
    assert search(*arguments) == expected


def test_the_largest_that_fits_and_how_fast_each_is(tmp_path: Path) -> None:
    lines: list[str] = []
    config = config_of(tmp_path / "runs")
    result = find_batch_size(Limited, config, tell=lines.append)
    assert sizes_of(result) == [
        (2, True),
        (4, True),
        (8, True),
        (16, False),
        (12, False),
        (10, True),
        (11, True),
    ]
    assert result.largest == 11
    assert result.trials[3].text == "tried to allocate for 16 samples"
    fitting = [trial for trial in result.trials if trial.fits]
    assert all((trial.samples_per_second or 0) > 0 and trial.memory for trial in fitting)
    assert result.efficient in [trial.size for trial in fitting]
    assert len(lines) == 7
    assert lines[3] == "16: out of memory"
    assert "largest that fits 11" in str(result)
    # Nothing is written, nothing is changed, and no process is left (the conftest looks).
    assert not (tmp_path / "runs").exists()
    assert config.batch_size == 2


class OneRankLimited(Limited):
    """The other rank goes on, and waits in the gradients' all-reduce."""

    def compute_loss(self, batch: Any, batch_idx: int) -> Any:
        self.most = 5 if self.world.rank == 1 else 1000
        return super().compute_loss(batch, batch_idx)


LAYOUTS = {
    "ddp": DeviceParameters.DDP(accelerator="cpu", devices=2),
    "sharded": DeviceParameters.FSDP(dp_shard=2, accelerator="cpu", devices=2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_memory_on_one_rank_is_no_memory_for_all(layout: str, tmp_path: Path) -> None:
    config = config_of(tmp_path, device_parameters=LAYOUTS[layout])
    result = find_batch_size(OneRankLimited, config, tell=None)
    assert sizes_of(result) == [(2, True), (4, True), (8, False), (6, False), (5, True)]


def _under_a_launcher(root: Path) -> BatchSizeResult:
    config = config_of(root, device_parameters=DeviceParameters.DDP(accelerator="cpu"))
    return find_batch_size(OneRankLimited, config, mode="power", tell=None)


def test_ranks_of_a_launcher_agree(tmp_path: Path) -> None:
    first, second = run_ranks(2, _under_a_launcher, tmp_path)
    assert first == second
    assert sizes_of(first) == [(2, True), (4, True), (8, False)]


@dataclass(kw_only=True)
class FewConfig(TinyConfig):
    drop_last: bool = False


class Few(TinyTrainer):
    config: FewConfig

    def configure_dataloaders(self) -> Any:
        train, _ = super().configure_dataloaders()
        return DataLoader(
            train.dataset, self.config.batch_size, drop_last=self.config.drop_last
        ), None


@pytest.mark.parametrize("drop_last", [False, True])
def test_data_end_before_memory(drop_last: bool, tmp_path: Path) -> None:
    given = vars(config_of(tmp_path, num_samples=10, batch_size=4))
    result = find_batch_size(Few, FewConfig(**given, drop_last=drop_last), tell=None)
    assert [(trial.size, trial.outcome) for trial in result.trials] == [
        (4, "fits"),
        (8, "fits"),
        (16, "more_than_the_data"),
        (12, "more_than_the_data"),
        (10, "fits"),
        (11, "more_than_the_data"),
    ]
    assert result.largest == 10


class Allocating(TinyTrainer):
    """Needs 50 MiB for a sample: the CPU's own allocator refuses."""

    def compute_loss(self, batch: Any, batch_idx: int) -> Any:
        room = torch.ones(len(batch["x"]), 50, 2**20, dtype=torch.uint8)
        return super().compute_loss(batch, batch_idx) + 0 * room[0, 0, 0]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="limits are those of Linux")
def test_a_cpu_without_memory_is_noticed_before_the_system_kills(tmp_path: Path) -> None:
    config = config_of(tmp_path, has_validation=False)
    result = find_batch_size(Allocating, config, mode="power", memory_limit=280 << 20, tell=None)
    assert sizes_of(result) == [(2, True), (4, True), (8, False)]
    assert "DefaultCPUAllocator" in result.trials[-1].text
    small, large = (trial.memory or 0 for trial in result.trials[:2])
    assert large - small > 90 << 20


class Killed(TinyTrainer):
    def compute_loss(self, batch: Any, batch_idx: int) -> Any:
        if len(batch["x"]) > 4:
            os.kill(os.getpid(), 9)  # as the kernel does, where memory ends
        return super().compute_loss(batch, batch_idx)


def test_a_process_that_the_system_kills_had_no_memory(tmp_path: Path) -> None:
    result = find_batch_size(Killed, config_of(tmp_path), mode="power", tell=None)
    assert sizes_of(result) == [(2, True), (4, True), (8, False)]


class Wrong(TinyTrainer):
    def compute_loss(self, batch: Any, batch_idx: int) -> Any:
        raise ArithmeticError("a mistake of the user's own")


@pytest.mark.parametrize("devices", [1, 2])
def test_another_error_is_raised_as_what_it_is(devices: int, tmp_path: Path) -> None:
    parameters = DeviceParameters(accelerator="cpu", devices=devices)
    with pytest.raises(ArithmeticError, match="a mistake of the user's own"):
        find_batch_size(Wrong, config_of(tmp_path, device_parameters=parameters), tell=None)


class Writing(Callback):
    """Fails where a run would end, which no trial reaches."""

    def post_fit(self, trainer: Any) -> None:
        raise AssertionError("a trial is no run")


def test_windows_are_tried_with_two_batches_and_callbacks_are_there(tmp_path: Path) -> None:
    note = tmp_path / "note"

    class Counting(Writing):
        def post_train_step(self, trainer: Any, *_: Any) -> None:
            note.write_text(f"{trainer.progress.num_batches} {trainer.global_step}")

    for options in ({"gradient_accumulation_steps": 5}, {"global_batch_size": 64}):
        config = config_of(tmp_path, callbacks={"counting": Counting()}, **options)
        find_batch_size(TinyTrainer, config, max_size=2, steps=3, tell=None)
        assert note.read_text() == "6 3"


@dataclass
class Data:
    size: int = 4


@dataclass(kw_only=True)
class NestedConfig(TinyConfig):
    data: Data = field(default_factory=Data)


class Nested(Limited):
    config: NestedConfig

    def configure_dataloaders(self) -> Any:
        train, val = super().configure_dataloaders()
        return DataLoader(train.dataset, self.config.data.size), val


def test_a_field_by_its_dotted_name(tmp_path: Path) -> None:
    config = NestedConfig(**vars(config_of(tmp_path)))
    result = find_batch_size(Nested, config, field="data.size", mode="power", tell=None)
    assert sizes_of(result) == [(4, True), (8, True), (16, False)]
    assert config.data == Data()
    with pytest.raises(ConfigError, match="that field is not their size"):
        find_batch_size(Nested, config, tell=None)
    with pytest.raises(ConfigError, match=r"no field 'length' \(data.length\)\nThere is: size"):
        find_batch_size(Nested, config, field="data.length", tell=None)


def test_mistakes_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        find_batch_size(
            TinyTrainer,
            config_of(tmp_path, batch_size=0),
            mode="cubic",  # type: ignore[arg-type]
            steps=1,
            max_size=0,
        )
    assert len(caught.value.problems) == 4


def test_nothing_fits(tmp_path: Path) -> None:
    class Full(Limited):
        most = 0

    with pytest.raises(ConfigError, match="1 does not fit: tried to allocate for 1 samples"):
        find_batch_size(Full, config_of(tmp_path), tell=None)


def test_where_speed_ends(tmp_path: Path) -> None:
    speeds = {8: 100.0, 16: 190.0, 32: 290.0, 64: 310.0, 128: 300.0}
    trials = [Trial(size, "fits", speed, 2**20 * size, "") for size, speed in speeds.items()]
    trials.append(Trial(256, "out_of_memory", None, None, "no room"))
    result = BatchSizeResult("batch_size", 8, tuple(trials))
    assert (result.largest, result.efficient) == (128, 32)
    labels = [text.get_text() for text in result.plot().get_legend().get_texts()]
    assert labels == ["samples per second", "efficient 32", "does not fit: 256", "peak memory"]
    result.save(tmp_path / "sizes.png")
    assert (tmp_path / "sizes.png").read_bytes().startswith(b"\x89PNG")


class OnPlateau(TinyTrainer):
    """Its schedule asks for a validation, of which a trial has none."""

    def configure_schedulers(self) -> Any:
        (optimizer,) = self.named_optimizers().values()
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return Schedule(plateau, every="epoch", monitor="val/loss")


def test_what_steers_a_run_by_its_epochs_does_not_end_a_trial(tmp_path: Path) -> None:
    callbacks: dict[str, Any] = {
        "stopping": EarlyStopping("train/loss", patience=1, min_delta=100.0),
        "swa": SWA(),
    }
    config = config_of(tmp_path, num_samples=8, n_epochs=2, callbacks=callbacks)
    result = find_batch_size(OnPlateau, config, max_size=4, steps=6, tell=None)
    assert sizes_of(result) == [(2, True), (4, True)]
