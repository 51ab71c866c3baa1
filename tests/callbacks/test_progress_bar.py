"""ProgressBar draws on a terminal and speaks in lines elsewhere."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support import tiny

from dream_trainer.callbacks import LearningRateMonitor, ProgressBar

# A run seeds the global streams.
pytestmark = pytest.mark.may_leave("rng")


def output(root: Path, *, terminal: bool, **options: Any) -> str:
    file = io.StringIO()
    ticks = iter(range(1_000_000))
    bar = ProgressBar(
        seconds_per_line=4.0,
        console=Console(file=file, force_terminal=terminal, width=100),
        clock=lambda: float(next(ticks)),
    )
    tiny(root, callbacks={"progress": bar}, enable=False, **options).fit()
    return file.getvalue()


def test_without_a_terminal_there_is_a_line_every_few_seconds(tmp_path: Path) -> None:
    lines = output(tmp_path, terminal=False, n_epochs=1, num_samples=48).splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "epoch 1/1, step 5, batch 5",
        "epoch 1/1, step 10, batch 10",
        "epoch 1/1, step 12",
    ]
    assert "val/loss" in lines[-1]
    assert not any("\x1b" in line for line in lines)


def test_on_a_terminal_there_is_a_bar_with_the_results(tmp_path: Path) -> None:
    text = output(tmp_path, terminal=True, n_epochs=2)
    assert "epoch 1/2" in text
    assert "epoch 2/2" in text
    assert "6/6" in text
    assert "val/loss" in text


def test_a_run_that_is_counted_in_steps_is_drawn_by_its_epochs(tmp_path: Path) -> None:
    text = output(tmp_path, terminal=True, n_epochs=None, max_steps=3)
    assert "epoch 1" in text
    assert "epoch 1/" not in text
    assert "3/6" in text


def test_the_learning_rate_of_several_groups_is_told_apart(tmp_path: Path) -> None:
    import torch
    from support import TinyTrainer

    class Groups(TinyTrainer):
        def configure_optimizers(self) -> Any:
            weights = [p for p in self.net.parameters() if p.ndim > 1]
            biases = [p for p in self.net.parameters() if p.ndim == 1]
            groups = [{"params": weights, "lr": 0.1}, {"params": biases, "lr": 0.2}]
            return torch.optim.SGD(groups)

    trainer = tiny(tmp_path, Groups, callbacks={"lr": LearningRateMonitor()}, max_steps=1)
    trainer.fit()
    text = (trainer.run_directory / "metrics.jsonl").read_text()
    assert '"lr/net/0": 0.1, "lr/net/1": 0.2' in text
