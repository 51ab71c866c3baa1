"""Runs to report on: a real one with a timeline by hand."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support import tiny
from timelines import checkpoint, end, progress, start, validation, write

MEASURED = {"samples_per_second": 100.0, "memory/process_gib": 0.5, "loader_wait": 0.1}


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps that looks as if it had been killed at step 9, and went on at 6."""
    trainer = tiny(
        tmp_path_factory.mktemp("runs"),
        n_epochs=2,
        monitor="val/loss",
        callbacks={},
        async_save=False,
    )
    trainer.fit()
    run = Path(trainer.run_directory)
    write(
        run / "timeline.jsonl",
        start(1_800_000_002, began=1_800_000_000, host="node-1", device="cpu"),
        progress(1_800_000_008, 5, MEASURED, train=5, loader=1),
        validation(1_800_000_010, 6, took=1),
        checkpoint(1_800_000_011, 6, stall=0.5),
        progress(1_800_000_013, 9, MEASURED, train=8, loader=1, validation=1, save=0.5),
        start(1_800_000_032, 6, began=1_800_000_030),
        progress(1_800_000_038, 12, MEASURED, train=6),
        end(1_800_000_038, 12),
    )
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "runs" / "tiny", symlinks=True))
