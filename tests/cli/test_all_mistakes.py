"""Everything that is wrong with a command line, in one message, with its places."""

from __future__ import annotations

from pathlib import Path

import pytest
from programs import fit, refused, write

pytestmark = pytest.mark.usefixtures("program")


def test_mistakes_in_files_variables_and_options_are_told_together() -> None:
    text = """
    batch_size: many
    callbacks:
      early: {class_path: Early, init_args: {patience: long, mood: min}}
      gone: {class_path: gone.X}
    training_parameters:
      n_epochs: 1.5
      max_stepz: 3
    """
    words = ["--config", write("run.yaml", text), "--config", "gone.yaml", "--nope", "3"]
    said = refused(*words, "--trainig_parameters.n_epochs=2", DREAM_TRAINER_DTYPE="float31")
    for line in (
        "gone.yaml: there is no such file",
        "run.yaml:2: batch_size: expected int, got 'many'",
        "run.yaml:4: callbacks.early.patience: ",
        "run.yaml:4: callbacks.early.mood: __main__.Early has no argument mood; did you mean mode?",
        "run.yaml:5: callbacks.gone: gone.X cannot be imported: ModuleNotFoundError: No",
        "run.yaml:7: training_parameters.n_epochs: expected int or null, got '1.5'",
        "run.yaml:8: there is no training_parameters.max_stepz; did you mean ",
        "DREAM_TRAINER_DTYPE: ",
        "options: there is no --nope",
        "there is no --trainig_parameters.n_epochs; did you mean --training_parameters.n_epochs",
    ):
        assert f"  - {line}" in said or line in said, (line, said)
    lines = said.splitlines()
    assert lines[0] == "train.py: error: 10 mistakes:"
    assert len(lines) == 12
    assert lines[-1] == "'train.py fit --help' lists the options."


def test_values_that_cannot_work_together_are_told_beside_wrong_types() -> None:
    words = ["--batch_size", "x", "--training_parameters.n_epochs", "0"]
    said = refused(*words, "--checkpoint_parameters.keep_last", "0")
    assert "--batch_size: expected int, got 'x'" in said
    assert "training_parameters: n_epochs=0 is not a whole number above 0" in said
    assert "checkpoint_parameters: keep_last=0" in said


def test_the_value_that_counts_is_the_one_that_is_named() -> None:
    write("a.yaml", "batch_size: 3")
    write("b.yaml", "note: b\nbatch_size: three")
    words = ["--config", "a.yaml", "--config", "b.yaml"]
    assert "b.yaml:2: batch_size: expected int, got 'three'" in refused(*words)
    assert "--batch_size: expected int, got 'four'" in refused(*words, "--batch_size", "four")


def test_what_was_wrong_is_not_told_to_be_missing() -> None:
    program = Path("train.py").read_text(encoding="utf-8")
    write("train.py", program.replace("batch_size: int = 4", "batch_size: int"))
    assert "no value" not in refused("--batch_size", "x")
    assert "--batch_size: has no value and no default" in refused("--note", "a")


def test_stray_words_and_missing_values() -> None:
    assert "options: there is no stray" in refused("stray")
    assert "options: there is no b" in refused("--note", "a", "b")
    assert "--note: expected one argument" in refused("--note")
    assert "--config: the name of a file is missing" in refused("--config")


def test_nothing_and_a_comment_are_not_null() -> None:
    assert "--seed: expected int or null, got ''" in refused("--seed=")
    assert "seed: expected a value or null, got '#3'" in refused("--seed=#3")
    said = refused("--config", write("a.yaml", "note: '#fine'\nseed: '#3'"))
    assert "a.yaml:2: seed: expected a value or null, got '#3'" in said


def test_null_in_a_file_is_no_value_of_a_type_without_it() -> None:
    text = "group: null\ntraining_parameters: {deterministic: null, n_epochs: null, max_steps: 1}"
    said = refused("--config", write("a.yaml", text))
    assert "a.yaml:1: group: expected a value, got null" in said
    assert "a.yaml:2: training_parameters.deterministic: expected a value, got null" in said
    assert "n_epochs" not in said


def test_debug_shows_our_own_traceback_and_is_no_option_of_the_run() -> None:
    done = fit("--batch_size", "x", "--debug")
    assert done.status == 2
    assert "Traceback (most recent call last)" in done.err
    assert done.err.endswith("train.py: error: --batch_size: expected int, got 'x'\n")
    assert "debug" not in fit("--debug", "--print_config").out


def test_help_comes_in_spite_of_mistakes() -> None:
    done = fit("--nope", "--config", "gone.yaml", "--help", DREAM_TRAINER_NOPE="1")
    assert (done.status, done.err) == (0, "")
    assert "--batch_size" in done.out
