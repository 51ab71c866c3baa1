"""``find-lr`` and ``find-batch-size``: what they print, draw and refuse; they leave no run."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from support import TinyTrainer, run_ranks

from dream_trainer import BatchSizeResult, LearningRateResult
from dream_trainer.cli import DreamCLI

LIMITS = ["--training_parameters.n_epochs", "2", "--device_parameters.accelerator", "cpu"]
RATES = ["find-lr", "--steps", "20", "--min-lr", "1e-4", *LIMITS]
SIZES = ["find-batch-size", "--num_samples", "100", "--mode", "power", *LIMITS]


class Limited(TinyTrainer):
    def compute_loss(self, batch: Any, batch_idx: int) -> Any:
        if len(batch["x"]) > 10:
            raise torch.OutOfMemoryError("no room")
        return super().compute_loss(batch, batch_idx)


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as end:
        DreamCLI(Limited, words, prog="train.py {}")
    assert end.value.code == 2
    return capsys.readouterr().err


def test_a_rate_and_how_to_set_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    cli = DreamCLI(TinyTrainer, [*RATES, "--field", "lr", "--output", "rates.png"])
    result = cli.result
    assert isinstance(result, LearningRateResult)
    assert result.suggestion is not None
    lines = capsys.readouterr().out.splitlines()
    assert lines[:-2] == str(result).splitlines()
    assert lines[-2:] == [f"set it with --lr {result.suggestion:.2g}", "rates.png"]
    assert [path.name for path in tmp_path.iterdir()] == ["rates.png"]
    assert cli.trainer is None
    # Once more, over what is there.
    assert "is there already" in refused(capsys, *RATES, "--output", "rates.png")


def test_without_a_field_it_says_how_to_name_one(capsys: pytest.CaptureFixture[str]) -> None:
    DreamCLI(TinyTrainer, RATES)
    assert "--field NAME" in capsys.readouterr().out.splitlines()[-1]


def test_sizes_and_how_to_set_them(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    result = DreamCLI(Limited, [*SIZES, "--output", "sizes.png"]).result
    assert isinstance(result, BatchSizeResult)
    assert [(trial.size, trial.fits) for trial in result.trials] == [
        (4, True),
        (8, True),
        (16, False),
    ]
    said = capsys.readouterr()
    assert said.out.startswith("size")
    assert said.out.splitlines()[-2].startswith("set it with --batch_size 8")
    assert said.err.splitlines()[-1] == "16: out of memory"
    assert [path.name for path in tmp_path.iterdir()] == ["sizes.png"]


def test_mistakes_are_told_before_anything_is_tried(capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, *RATES, "--field", "optimizer.lr")
    assert "TinyConfig has no field 'optimizer' (optimizer.lr)" in said
    assert "min_lr=0.0001 and max_lr=1e-05" in refused(capsys, *RATES, "--max_lr", "1e-5")
    assert "no field 'size'" in refused(capsys, *SIZES, "--field", "size")
    assert "--steps" in refused(capsys, "find-lr", "--steps", "many", *LIMITS)


def _said_on_a_rank(words: list[str]) -> str:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        DreamCLI(TinyTrainer, words)
    return said.getvalue()


@pytest.mark.parametrize("words", [RATES, [*SIZES, "--max_size", "8"]], ids=["rates", "sizes"])
def test_on_ranks_the_first_speaks(words: list[str], tmp_path: Path) -> None:
    first, second = run_ranks(2, _said_on_a_rank, words)
    assert first.count("suggestion") + first.count("set it with") == 1
    assert second == ""
    assert list(tmp_path.iterdir()) == []
