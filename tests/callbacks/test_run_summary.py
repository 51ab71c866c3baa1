"""RunSummary says what a run is about to do, and what it has done; nothing of it twice."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from support import TinyTrainer, exact_state, run_ranks, tiny
from torch import nn

from dream_trainer.callbacks import Callback, RunSummary
from dream_trainer.errors import ConfigError

# A run seeds the global streams.
pytestmark = pytest.mark.may_leave("rng")


class Deep(TinyTrainer):
    """Two models that share a layer, one of them frozen in part."""

    def configure_models(self) -> None:
        shared = nn.Linear(8, 8)
        self.net = nn.Sequential(nn.Sequential(nn.Linear(3, 8), nn.Tanh()), shared, nn.Linear(8, 1))
        self.net[0][0].bias.requires_grad_(False)
        self.other = nn.Sequential(shared, nn.Linear(8, 2))

    def configure_optimizers(self) -> Any:
        return {"net": torch.optim.AdamW([p for p in self.net.parameters() if p.requires_grad])}


def fitted(
    root: Path, kind: type[TinyTrainer] = TinyTrainer, *, terminal: bool = False, **options: Any
) -> list[str]:
    """What the summary prints, line by line."""
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=100, color_system=None)
    summary = RunSummary(
        depth=options.pop("depth", 1), min_steps=options.pop("min_steps", 0), console=console
    )
    callbacks = options.pop("callbacks", {}) | {"summary": summary}
    tiny(root, kind, callbacks=callbacks, **options).fit()
    return [line.rstrip() for line in file.getvalue().splitlines()]


@pytest.mark.parametrize("terminal", [False, True])
def test_it_says_what_comes_and_what_has_been(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], terminal: bool
) -> None:
    directory = tmp_path / "default" / "default" / "tiny"
    lines = fitted(tmp_path, terminal=terminal, monitor="val/loss", gradient_accumulation_steps=2)
    time = lines.pop(10)
    assert lines == [
        f"new run in {directory}",
        "devices  1 rank on cpu, single device, 32-true, seed 42",
        "model    module             parameters   trainable   bytes",
        "         net (Sequential)           41          41   164 B",
        "           0 (Linear)               32          32   128 B",
        "           3 (Linear)                9           9    36 B",
        "data     train: 24 samples, 6 batches; val: 10 samples, 3 batches",
        "batch    4 samples x 2 batches x 1 data-parallel rank = 8 samples a step",
        "length   2 epochs: 6 optimizer steps",
        f"done at step 6, after 2 epochs: {directory}",
        *lines[10:12],
        "  newest      checkpoints/step-00000006",
        "  log         metrics.jsonl",
        f"  view        dream-trainer report {directory}",
    ]
    assert re.fullmatch(r"  validation  val/loss 0\.\d+", lines[10])
    assert re.fullmatch(
        r"  best        val/loss 0\.\d+ at step [36]: checkpoints/step-\S+", lines[11]
    )
    assert re.fullmatch(r"  time        0:00:0\d, \S+ steps/s, \S+ samples/s", time)
    assert capsys.readouterr().out == ""  # nothing is said twice


def test_without_it_there_are_two_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny(tmp_path).fit()
    directory = tmp_path / "default" / "default" / "tiny"
    assert capsys.readouterr().out.splitlines() == [
        f"new run in {directory}",
        f"done at step 12, after 2 epochs: {directory}",
    ]


def test_a_small_run_gets_two_lines(tmp_path: Path) -> None:
    assert fitted(tmp_path, min_steps=50, enable=False) == [
        "TinyTrainer, nothing on disk: 12 steps, 41 parameters, 1 rank on cpu, single device, "
        "32-true, seed 42",
        "done at step 12, after 2 epochs",
    ]


def test_a_shared_layer_counts_once_and_frozen_weights_are_not_trainable(tmp_path: Path) -> None:
    text = str(tiny(tmp_path, Deep).summary(depth=2))
    table = [line.split() for line in text.splitlines()[2:11]]
    assert table == [
        ["model", "module", "parameters", "trainable", "bytes"],
        ["net", "(Sequential)", "113", "105", "452", "B"],
        ["0", "(Sequential)", "32", "24", "128", "B"],
        ["0", "(Linear)", "32", "24", "128", "B"],
        ["1", "(Linear)", "72", "72", "288", "B"],
        ["2", "(Linear)", "9", "9", "36", "B"],
        ["other", "(Sequential)", "18", "18", "72", "B"],
        ["1", "(Linear)", "18", "18", "72", "B"],
        ["in", "all", "131", "123", "524", "B"],
    ]


def test_of_many_layers_the_first_are_listed(tmp_path: Path) -> None:
    class Many(TinyTrainer):
        def configure_models(self) -> None:
            self.net = nn.Sequential(nn.Linear(3, 8), *(nn.Linear(8, 8) for _ in range(30)))
            self.net.append(nn.Linear(8, 1))

    what = tiny(tmp_path, Many).summary()
    assert len(what.modules) == 12
    assert what.modules[-1].name == "net.22 more"
    assert sum(one.parameters for one in what.modules if one.depth == 1) == what.total.parameters


def test_a_summary_tells_how_fit_would_start_and_changes_nothing(tmp_path: Path) -> None:
    def heading(**options: Any) -> str:
        return tiny(tmp_path, **options).summary().heading

    directory = tmp_path / "default" / "default" / "tiny"
    assert heading() == f"would be a new run in {directory}"
    assert not directory.exists()
    assert heading(init_from="a.pt").endswith(", with weights from a.pt")
    assert heading(enable=False) == "nothing on disk"
    assert "has no checkpoint" in heading(resume="must")
    trainer = tiny(tmp_path, n_epochs=1)
    trainer.summary()
    trainer.fit()
    assert trainer.summary().heading == f"new run in {directory}"
    assert heading() == f"would go on in {directory} at step 6 (step-00000006)"
    straight = tiny(tmp_path, n_epochs=1, experiment="straight")
    straight.fit()
    assert exact_state(trainer) == exact_state(straight)


def test_a_resumed_run_says_so_and_counts_its_own_time(tmp_path: Path) -> None:
    fitted(tmp_path, n_epochs=1)
    lines = fitted(tmp_path, n_epochs=2)
    assert re.fullmatch(
        r"resuming \S+/tiny at step 6, after 1 epoch \(step-00000006, saved \S+\)", lines[0]
    )
    time = next(line for line in lines if line.startswith("  time"))
    assert re.search(r"0:00:0\d, of 0:00:0\d with earlier starts, ", time)


def test_a_trainer_that_fits_once_more_goes_on(tmp_path: Path) -> None:
    file = io.StringIO()
    summary = RunSummary(console=Console(file=file, width=100))
    trainer = tiny(tmp_path, callbacks={"summary": summary}, n_epochs=1)
    trainer.fit()
    trainer.training_parameters.n_epochs = 2
    trainer.fit()
    starts = [line for line in file.getvalue().splitlines() if "parameters" in line]
    assert starts[0].startswith("new run in ")
    assert starts[1].startswith("going on at step 6, after 1 epoch: ")


def test_a_run_that_was_done_shows_its_last_validation(tmp_path: Path) -> None:
    first = fitted(tmp_path, monitor="val/loss")
    again = fitted(tmp_path, monitor="val/loss")
    assert "at step 12, after 2 epochs (" in again[0]
    for label in ("  validation", "  best", "  newest"):
        (one,), (other,) = (
            [line for line in lines if line.startswith(label)] for lines in (first, again)
        )
        assert one == other


def test_a_validation_of_an_earlier_step_says_so(tmp_path: Path) -> None:
    lines = fitted(tmp_path, n_epochs=None, max_steps=8)
    (found,) = [line for line in lines if line.startswith("  validation")]
    assert found.endswith("(of step 6)")
    assert any(line.startswith("done at step 8, in epoch 2: ") for line in lines)


def test_a_start_from_weights_says_so(tmp_path: Path) -> None:
    tiny(tmp_path, experiment="first").fit()
    first = tmp_path / "default" / "default" / "first"
    lines = fitted(tmp_path, init_from=str(first), n_epochs=1)
    assert re.fullmatch(r"new run in \S+/tiny, weights from \S+: 4 of 4", lines[0])


def test_a_stop_a_failure_and_ctrl_c_are_told_apart(tmp_path: Path) -> None:
    class Ending(Callback):
        def __init__(self, how: str) -> None:
            self.how = how

        def post_train_step(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 3 and self.how == "stop":
                trainer.stop("seen enough")
            elif trainer.global_step == 3:
                raise KeyboardInterrupt if self.how == "interrupt" else RuntimeError("no")

    def last(how: str) -> str:
        file = io.StringIO()
        summary = RunSummary(console=Console(file=file, width=100))
        callbacks = {"ending": Ending(how), "summary": summary}
        trainer = tiny(tmp_path, callbacks=callbacks, enable=False)
        with contextlib.suppress(KeyboardInterrupt, RuntimeError):
            trainer.fit()
        return file.getvalue().splitlines()[-1]

    assert last("stop") == "seen enough at step 3, in epoch 1"
    assert last("interrupt") == "interrupted at step 3, in epoch 1"
    assert last("failure") == "failed at step 3, in epoch 1"


def test_samples_are_counted_with_a_short_last_batch_and_over_a_resume(tmp_path: Path) -> None:
    def samples(**options: Any) -> int:
        summary = RunSummary()
        trainer = tiny(tmp_path, callbacks={"summary": summary}, num_samples=26, **options)
        trainer.fit()
        return summary.num_samples

    assert samples(n_epochs=None, max_steps=10) == 26 + 3 * 4
    assert samples(n_epochs=3) == 3 * 26 - (26 + 3 * 4)


def test_negative_numbers_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"depth is -1(.|\n)*min_steps is -2"):
        RunSummary(depth=-1, min_steps=-2)


@pytest.mark.distributed
@pytest.mark.parametrize("sharded", [False, True])
def test_on_ranks_the_first_one_says_what_all_hold(tmp_path: Path, sharded: bool) -> None:
    options = {"dp_shard": 2} if sharded else {}

    def rank() -> list[str]:
        return fitted(tmp_path, **options)

    first, second = run_ranks(2, rank)
    assert second == []
    net = next(line.split() for line in first if "net (" in line)
    if sharded:
        assert "2 ranks on cpu, Mesh (dp_shard 2), 32-true" in first[1]
        # Of 8 rows each rank has 4; of the one row of the last layer and its bias this has all.
        assert net == ["net", "(Sequential)", "41", "41", "164", "B", "100", "B"]
    else:
        assert "2 ranks on cpu, DDP, 32-true" in first[1]
        assert net == ["net", "(Sequential)", "41", "41", "164", "B"]
    assert "batch    4 samples x 1 batch x 2 data-parallel ranks = 8 samples a step" in first
