"""ProgressBar draws on a terminal and in a notebook, and speaks in lines elsewhere."""

from __future__ import annotations

import io
import logging
import re
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.text import Text
from support import TinyTrainer, run_ranks, tiny

from dream_trainer import metrics
from dream_trainer.callbacks import Callback, LearningRateMonitor, ProgressBar
from dream_trainer.errors import ConfigError
from dream_trainer.loggers import JsonlLog

# A run seeds the global streams.
pytestmark = pytest.mark.may_leave("rng")


class Ticks:
    """A clock: a second passes with every step, half of one with a batch of an evaluation."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Passing(Callback):
    def __init__(self, clock: Ticks) -> None:
        self.clock = clock

    def post_train_step(self, *_: Any) -> None:
        self.clock.now += 1.0

    def post_validation_step(self, *_: Any) -> None:
        self.clock.now += 0.5

    post_test_step = post_validation_step


class Relaxing(Callback):
    """Behind the bars of a step."""

    def on_boundary(self, trainer: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")


def drawing(
    *, terminal: bool, seconds: float = 4.0, **options: Any
) -> tuple[io.StringIO, dict[str, Any]]:
    """Where it is drawn, and the callbacks that draw it."""
    file, clock = io.StringIO(), Ticks()
    console = Console(file=file, force_terminal=terminal, width=120, color_system=None)
    bar = ProgressBar(seconds_per_line=seconds, console=console, clock=clock, **options)
    return file, {"passing": Passing(clock), "progress": bar}


def output(root: Path, *, terminal: bool, bar: dict[str, Any] | None = None, **options: Any) -> str:
    file, callbacks = drawing(terminal=terminal, **bar or {})
    more = options.pop("callbacks", {})
    tiny(root, callbacks=more | callbacks, **{"enable": False} | options).fit()
    return file.getvalue()


def test_a_log_gets_a_line_every_few_seconds_and_for_each_validation(tmp_path: Path) -> None:
    lines = output(tmp_path, terminal=False, n_epochs=2, num_samples=24).splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "epoch 1/2, step 5/12, batch 5/6",
        "epoch 1/2, step 6/12",
        "epoch 2/2, step 10/12, batch 4/6",
        "epoch 2/2, step 12/12",
    ]
    assert not any("\x1b" in line or line != line.rstrip() for line in lines)


def test_values_are_those_of_the_log_and_of_another_step_only_if_it_says_so(tmp_path: Path) -> None:
    lines = output(tmp_path, terminal=False, enable=True).splitlines()
    (log,) = tmp_path.rglob("metrics.jsonl")
    rows = JsonlLog(log).read()

    def value(step: int, name: str) -> str:
        (found,) = [row[name] for row in rows if row["step"] == step and name in row]
        return f"{name} {found:.4g}"

    assert lines[0].split("  ")[1:2] == [value(5, "train/loss")]
    assert lines[1].split("  ")[1:3] == [value(6, "train/loss"), value(6, "val/loss")]
    assert lines[2].split("  ")[1] == (
        f"{value(10, 'train/loss')} | {value(6, 'val/loss')} (of step 6)"
    )


def test_pace_and_time_left_leave_validations_out_and_in(tmp_path: Path) -> None:
    first, *_, last = output(tmp_path, terminal=False, n_epochs=2).splitlines()
    assert first.endswith("1 steps/s  0:00:05 gone, 0:00:07 left")
    # Three batches of half a second each: of the steps alone it is still one a second.
    assert last.endswith("1 steps/s  0:00:15 gone, 0:00:00 left")


def test_metrics_are_chosen_by_name_also_those_of_an_epoch(tmp_path: Path) -> None:
    lines = output(
        tmp_path,
        terminal=False,
        bar={"metrics": ["lr/*"], "seconds": 1.0},
        callbacks={"lr": LearningRateMonitor()},
        n_epochs=1,
    ).splitlines()
    told = [line for line in lines if line.startswith("epoch")]
    assert len(told) == 6
    assert all(re.search(r"  lr/net 0\.0\d+  ", line) for line in told)
    assert "loss" not in "".join(lines)


def test_on_a_terminal_there_are_bars_of_the_run_and_the_epoch(tmp_path: Path) -> None:
    text = output(tmp_path, terminal=True, n_epochs=2)
    assert re.search(r"run +━.* step  3/12 +1 steps/s  0:00:03 gone, 0:00:09 left", text)
    assert re.search(r"epoch 1/2 +━.* batch 3/6 +0:00:03 left", text)
    assert re.search(r"validation +━.* batch 2/3 +2 batches/s +0:00:00 left", text)
    assert "\nepoch 2/2, step 12/12  train/loss " in Text.from_ansi(text).plain


def test_a_run_that_is_counted_in_steps_is_drawn_by_its_epochs(tmp_path: Path) -> None:
    text = output(tmp_path, terminal=True, n_epochs=None, max_steps=3)
    assert "epoch 1" in text
    assert "epoch 1/" not in text
    assert "batch 3/6" in text
    assert "step 3/3" in text


def test_an_epoch_of_fewer_steps_has_a_shorter_bar(tmp_path: Path) -> None:
    text = output(tmp_path, terminal=True, n_epochs=1, train_steps_per_epoch=2)
    assert "batch 2/2" in text


def test_after_a_resume_only_the_steps_of_this_process_make_the_pace(tmp_path: Path) -> None:
    tiny(tmp_path, n_epochs=1).fit()
    first, *_ = output(
        tmp_path, terminal=False, bar={"seconds": 2.0}, enable=True, n_epochs=2
    ).splitlines()
    assert first.startswith("epoch 2/2, step 9/12, batch 3/6  train/loss ")
    assert re.search(r" \| val/loss \d\S+ \(of step 6\)  1 steps/s", first)
    assert first.endswith("0:00:03 gone, 0:00:03 left")


def test_a_limit_of_time_bounds_what_is_left(tmp_path: Path) -> None:
    file, callbacks = drawing(terminal=False)

    class Timed(TinyTrainer):
        def clock(self) -> float:
            return callbacks["passing"].clock()

    tiny(tmp_path, Timed, callbacks=callbacks, enable=False, n_epochs=5000, max_time=20.0).fit()
    first, *_ = file.getvalue().splitlines()
    assert first.endswith("0:00:05 gone, 0:00:16 left")  # four steps are over


def test_test_and_predict_have_bars(tmp_path: Path) -> None:
    class Tested(TinyTrainer):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return self.net(batch["x"])

    file, callbacks = drawing(terminal=True)
    trainer = tiny(tmp_path, Tested, callbacks=callbacks, enable=False)
    trainer.prepare()
    trainer.test(trainer.val_dataloader)
    assert re.search(r"test +━.* batch 2/3", file.getvalue())
    trainer.validate()
    assert re.search(r"validation +━.* batch 2/3", file.getvalue())
    callbacks["progress"].post_predict_step(trainer, None, None, 0)
    callbacks["progress"].close(trainer)
    assert re.search(r"predict +━? *.* batch 1/3", file.getvalue())
    assert "run " not in file.getvalue()


def test_a_test_in_the_middle_of_a_fit_leaves_its_bars(tmp_path: Path) -> None:
    class Tests(Callback):
        def post_epoch(self, trainer: Any) -> None:
            trainer.test([{"x": torch.ones(4, 3), "y": torch.ones(4, 1)}] * 3)

    text = output(tmp_path, terminal=True, callbacks={"tests": Tests()})
    assert re.search(r"test +━.* batch 2/3", text)
    assert re.search(r"run +━.* step 11/12 +1 steps/s", text)


def test_print_warnings_and_logging_come_above_the_bars(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    shown = Terminal()
    monkeypatch.setattr(sys, "stdout", shown)
    monkeypatch.setattr(sys, "stderr", shown)
    handler = logging.StreamHandler(sys.stderr)
    logger = logging.getLogger("noise")
    logger.addHandler(handler)

    class Noise(Callback):
        def post_train_step(self, *_: Any) -> None:
            print("a line of print")
            logger.warning("a line of logging")
            with warnings.catch_warnings():
                warnings.simplefilter("always")
                sys.stderr.write(warnings.formatwarning("a warning", UserWarning, "x.py", 1))

    bar = ProgressBar(console=Console(force_terminal=True, width=90), clock=Ticks())
    tiny(tmp_path, callbacks={"noise": Noise(), "progress": bar}, enable=False).fit()
    logger.removeHandler(handler)
    assert handler.stream is shown
    assert sys.stdout is sys.stderr is shown
    # Each comes after the bars were erased, and not behind one on its line.
    lines = shown.getvalue().split("\n")
    for text in ("a line of print", "a line of logging", "a warning"):
        found = [line for line in lines if text in line]
        assert len(found) == 12
        assert not any("━" in line for line in found)


def test_in_a_file_standard_error_stays_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = io.StringIO()
    monkeypatch.setattr(sys, "stderr", errors)

    class Noise(Callback):
        def post_train_step(self, *_: Any) -> None:
            print("an error", file=sys.stderr)

    shown = output(tmp_path, terminal=True, n_epochs=1, callbacks={"noise": Noise()})
    assert errors.getvalue().count("an error") == 6
    assert "an error" not in shown


def test_a_notebook_has_one_output_that_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown: list[Any] = []

    class Handle:
        def update(self, drawn: Any) -> None:
            shown.append(drawn)

    def display(drawn: Any, *, display_id: bool) -> Handle:
        assert display_id
        assert not shown
        shown.append(drawn)
        return Handle()

    package, module = types.ModuleType("IPython"), types.ModuleType("IPython.display")
    module.display = display  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", package)
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    clock = Ticks()
    bar = ProgressBar(console=Console(force_jupyter=True, width=100), clock=clock)
    callbacks = {"passing": Passing(clock), "progress": bar}
    tiny(tmp_path, callbacks=callbacks, enable=False, n_epochs=1).fit()
    assert len(shown) > 6
    html = [one._repr_mimebundle_([], [])["text/html"] for one in shown]
    assert "epoch 1/1" in html[0]
    assert "━" in html[3]
    assert "━" not in html[-1]
    assert "epoch 1/1, step 6/6  train/loss " in capsys.readouterr().out


def test_a_value_on_its_way_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on CUDA, where a copy takes until the steps that are queued before it are over."""
    asked: list[int] = []

    class Slow(metrics.ArrivingValues):
        @property
        def are_here(self) -> bool:
            asked.append(1)
            return len(asked) % 3 == 0  # two steps later

    monkeypatch.setattr("dream_trainer.callbacks.progress_bar.ArrivingValues", Slow)
    lines = output(tmp_path, terminal=False, n_epochs=1, num_samples=48).splitlines()
    assert lines[0].startswith("epoch 1/1, step 7/12, batch 7/12  train/loss ")
    assert "(of step 5)" in lines[0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no accelerator here")
def test_bars_on_an_accelerator_wait_for_nothing(tmp_path: Path) -> None:
    class Strict(Callback):
        def pre_train_step(self, trainer: Any, batch: Any, batch_idx: int) -> None:
            torch.cuda.set_sync_debug_mode("error" if batch_idx == 2 else "default")

    file, callbacks = drawing(terminal=True)
    late = {"late": Relaxing()}
    tiny(
        tmp_path,
        callbacks={"strict": Strict()} | callbacks | late,
        accelerator="cuda",
        enable=False,
        n_epochs=1,
        num_samples=48,
    ).fit()
    plain = Text.from_ansi(file.getvalue()).plain
    assert re.search(r"train/loss \d", plain)
    assert "step  3/12" in plain


def test_names_that_are_none_are_refused_and_one_name_is_one_name() -> None:
    assert ProgressBar("train/loss").metrics == ("train/loss",)
    with pytest.raises(ConfigError, match="3 is a int"):
        ProgressBar(metrics=["a", 3])  # type: ignore[list-item]


@pytest.mark.distributed
@pytest.mark.parametrize("options", [{}, {"dp_shard": 2}], ids=str)
def test_only_rank_0_draws(tmp_path: Path, options: dict[str, Any]) -> None:
    def rank() -> str:
        return output(tmp_path, terminal=False, n_epochs=1, num_samples=48, **options)

    first, second = run_ranks(2, rank)
    assert [line.split("  ")[0] for line in first.splitlines()] == [
        "epoch 1/1, step 5/6, batch 5/6",
        "epoch 1/1, step 6/6",
    ]
    assert second == ""


def test_the_learning_rate_of_several_groups_is_told_apart(tmp_path: Path) -> None:
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
