"""Subcommands as processes: what they run, print, write, and how they end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from programs import TRAIN, run_command, run_script, write

from dream_trainer import read_predictions

pytestmark = pytest.mark.usefixtures("program")

RUN = Path("runs/default/default/a")


def run(*words: str) -> str:
    done = run_script("train.py", *words)
    assert done.status == 0, done.err
    return done.out


def files_of_run() -> dict[Path, bytes]:
    """All but the lock, which says who has it."""
    there = (path for path in RUN.rglob("*") if path.is_file() and path.name != ".lock")
    return {path: path.read_bytes() for path in there}


def test_validate_test_and_predict_use_what_fit_has_saved() -> None:
    run("fit", "--experiment", "a")
    checkpoints = sorted(path.name for path in (RUN / "checkpoints").iterdir())
    results = {}
    for name in ("validate", "test"):
        lines = run(name, "--experiment", "a").splitlines()
        (line,) = (one for one in lines if one.startswith(f"{'val' if name[0] == 'v' else name}/"))
        results[name] = line.split()[1]
    # The same points, so the same loss: test_step is validation_step.
    assert results["validate"] == results["test"]
    out = run("predict", "--experiment", "a", "--output", "out/predictions.pt")
    assert "out/predictions.pt: 16 samples" in out
    assert torch.load("out/predictions.pt").shape == (16, 1)
    assert [path.name for path in Path("out").iterdir()] == ["predictions.pt"]
    out = run("predict", "--experiment", "a", "--output", "out/folder")
    assert "out/folder: 16 samples" in out
    assert torch.equal(read_predictions("out/folder").together(), torch.load("out/predictions.pt"))
    assert sorted(path.name for path in (RUN / "checkpoints").iterdir()) == checkpoints


def test_predictions_are_not_written_over() -> None:
    write("there.pt", "mine")
    done = run_script("train.py", "predict", "--output", "there.pt")
    assert done.status == 2
    assert "there.pt: is there already" in done.err
    assert Path("there.pt").read_text(encoding="utf-8") == "mine"


def test_commands_work_on_the_checkpoint_that_they_are_told() -> None:
    monitor = ["--checkpoint_parameters.monitor", "val/loss"]
    rising = ["--checkpoint_parameters.mode", "max", "--experiment", "a"]
    out = run("fit", *monitor, *rising, "--then", "test", "--checkpoint", "best")
    checkpoints = RUN / "checkpoints"
    best = (checkpoints / "best").readlink().name
    newest = (checkpoints / "newest").readlink().name
    assert best != newest
    assert f"test on best: {best}, val/loss " in out
    of_best = _of(out, "test/loss")
    out = run("test", *monitor, *rising, "--checkpoint", "last")
    assert _of(out, "test/loss") != of_best
    out = run("validate", *monitor, *rising, "--checkpoint", str(checkpoints / best))
    assert _of(out, "val/loss") == of_best  # the same points
    out = run("predict", *monitor, *rising, "--checkpoint", newest, "--output", "p.pt")
    assert f"predict on {newest}" in out
    assert "p.pt: 16 samples" in out


def _of(out: str, name: str) -> str:
    (line,) = (one for one in out.splitlines() if one.startswith(f"{name} "))
    return line.split()[1]


def test_a_checkpoint_that_is_not_there_is_a_mistake_of_one_or_two_lines() -> None:
    run("fit", "--experiment", "a")
    told = {
        ("test", "--checkpoint", "best"): "'best' is judged by checkpoint_parameters.monitor",
        ("test", "--checkpoint", "bset"): "'bset' is neither 'best', 'last' nor a path; in runs",
        ("fit", "--checkpoint", "best"): "--checkpoint says what --then follows on",
        ("export-model",): "--output FILE is missing",
    }
    for words, text in told.items():
        done = run_script("train.py", *words, "--experiment", "a")
        assert (done.status, "Traceback" in done.err) == (2, False), done.err
        assert text in done.err


def test_a_model_is_exported_from_a_trainer_and_weights_from_a_checkpoint() -> None:
    write(
        "train.py",
        TRAIN.replace(
            "    def predict_step(",
            "    def export_example(self, batch):\n        return batch[0]\n\n"
            "    def predict_step(",
        ),
    )
    run("fit", "--experiment", "a")
    out = run("export-model", "--experiment", "a", "--output", "net.pt2", "--checkpoint", "last")
    assert "export on last: step-00000008" in out
    assert "net.pt2: " in out
    run("predict", "--experiment", "a", "--output", "p.pt")
    program = torch.export.load("net.pt2").module()
    x = torch.rand(16, 2, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(program(x), torch.load("p.pt"))
    words = ["export-model", "train.py:Trainer", "--experiment", "a", "--output", "net.pt"]
    assert run_command(*words).status == 0
    assert run_command("export", str(RUN), "weights.pt").status == 0
    weights = [torch.load(name) for name in ("net.pt", "weights.pt")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_fit_may_be_followed_by_test_on_the_same_trainer() -> None:
    out = run("fit", "--experiment", "a", "--then", "test")
    assert out.index("done at step 8") < out.index("test/loss ")
    assert "fresh weights" not in out
    (line,) = (one for one in out.splitlines() if one.startswith("test/loss "))
    assert line in run("test", "--experiment", "a").splitlines()
    done = run_script("train.py", "fit", "--then", "tset")
    assert done.status == 2
    assert "--then: invalid choice: 'tset'" in done.err


def test_a_trainer_without_a_loader_for_it_says_so() -> None:
    write("train.py", TRAIN.replace("def test_dataloader", "def another_dataloader"))
    write(
        "train.py",
        Path("train.py").read_text().replace("predict_dataloader = test_", "p = another_"),
    )
    for name in ("test", "predict"):
        done = run_script("train.py", name, "--checkpoint_parameters.enable=false")
        assert done.status == 2
        assert f"{name}: Trainer has no {name}_dataloader" in done.err


def test_verify_resume_tells_exact_from_inexact() -> None:
    words = ["verify-resume", "--steps", "2", "--training_parameters.train_steps_per_epoch", "1"]
    out = run(*words)
    assert "straight run again: exact" in out
    assert not Path("runs").exists()
    # Counts its own calls and forgets the count when it is killed.
    counted = TRAIN.replace(
        "return (self.model(x.to(",
        "self.model.calls = getattr(self.model, 'calls', 0) + 1\n"
        "        return self.model.calls * (self.model(x.to(",
    )
    write("train.py", counted)
    done = run_script("train.py", *words)
    assert done.status == 1
    assert "differs" in done.out


def test_a_program_may_have_options_and_subcommands_of_its_own() -> None:
    program = (
        TRAIN.partition("if __name__")[0]
        + """
def greet(cli):
    print("hello", cli.arguments.name, cli.own.times, cli.config.batch_size)


class Program(DreamCLI):
    commands = {
        **DreamCLI.commands,
        "greet": Command(
            "say hello", greet, lambda parser: parser.add_argument("--times", type=int, default=1)
        ),
    }

    def add_arguments(self, parser):
        parser.add_argument("--name", type=str, default="you", help="whom to greet")
        parser.link_arguments("batch_size", "training_parameters.n_epochs")


if __name__ == "__main__":
    Program(Trainer)
"""
    )
    write("train.py", program)
    out = run("greet", "--name", "me", "--times", "2", "--batch_size", "8")
    assert out == "hello me 2 8\n"
    assert "say hello" in run("--help")
    assert "whom to greet" in run("greet", "--help")
    assert "name: me" in run("fit", "--name", "me", "--print_config")
    run("fit", "--name", "me", "--batch_size", "3", "--experiment", "a")
    assert "name: me" in (RUN / "config.yaml").read_text(encoding="utf-8")
    done = run_script("train.py", "greet", "--nam", "me")
    assert (done.status, done.out) == (2, "")
    assert "there is no --nam; did you mean --name?" in done.err


def test_a_field_of_the_configuration_takes_the_place_of_a_commands_own_option() -> None:
    field = '    debug: bool = False\n    """Mine."""\n    training_parameters: Training'
    write("train.py", TRAIN.replace("    training_parameters: Training", field, 1))
    assert "debug: true" in run("fit", "--debug", "true", "--print_config")


def test_summarize_tells_what_fit_would_run_and_runs_nothing() -> None:
    lines = run("summarize", "--experiment", "a").splitlines()
    assert lines[0] == "would be a new run in runs/default/default/a"
    assert [line.split()[0] for line in lines if line[0] != " "][1:] == [
        "devices",
        "model",
        "data",
        "batch",
        "length",
    ]
    assert not Path("runs").exists()
    run("fit", "--experiment", "a")
    before = files_of_run()
    deeper = run("summarize", "--experiment", "a", "--depth", "0").splitlines()
    assert deeper[0].startswith("would go on in runs/default/default/a at step 8 (step-00000008")
    assert len(deeper) == 7
    assert files_of_run() == before


def test_a_second_run_neither_overwrites_nor_mixes_with_the_first_one() -> None:
    run("fit", "--experiment", "a")
    before = files_of_run()
    out = run("fit", "--config", str(RUN / "config.yaml"), "--experiment", "b")
    assert "new run in runs/default/default/b" in out
    other = RUN.with_name("b")
    assert (other / "metrics.jsonl").read_bytes() == (RUN / "metrics.jsonl").read_bytes()
    assert files_of_run() == before
    # The same name is the same run, which has ended; only the timeline says that it was asked.
    assert "done at step 8" in run("fit", "--config", str(RUN / "config.yaml"))
    timeline = RUN / "timeline.jsonl"
    after, then = files_of_run(), before.pop(timeline)
    assert after.pop(timeline).startswith(then)
    assert after == before


def test_what_is_given_wins_over_the_run_that_is_resumed_and_is_printed() -> None:
    run("fit", "--experiment", "a", "--note", "one")
    words = ["--experiment", "a", "--note", "two", "--training_parameters.n_epochs", "3"]
    out = run("fit", *words)
    assert "resuming runs/default/default/a at step 8" in out
    assert "  note: one -> two\n" in out
    assert "  training_parameters.n_epochs: 2 -> 3\n" in out
    assert "done at step 12" in out
    assert "note: one" in (RUN / "config.yaml.superseded-1").read_text(encoding="utf-8")


def test_the_command_takes_presets_variables_and_then_as_a_script_does() -> None:
    done = run_command(
        *("fit", "train:Trainer", "--preset", "debug", "--then", "test", "--nothing", "1"),
        DREAM_TRAINER_BATCH_SIZE="x",
    )
    assert done.status == 2
    assert "DREAM_TRAINER_BATCH_SIZE: expected int, got 'x'" in done.err
    done = run_command("fit", "train:Trainer", "--preset", "debug", "--then", "test")
    assert done.status == 0, done.err
    assert "test/loss" in done.out
