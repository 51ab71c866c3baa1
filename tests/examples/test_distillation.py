"""The student learns from its teacher, and a kill in either phase changes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from example_runs import assert_resumes_exactly, one_run, run

SCRIPT = "distillation/train.py"
#: An epoch of eight steps for the teacher, one for the student.
#: Of saves every three steps the first is surely there when step seven is taken.
SHORT = (
    *("--seed", "0", "--teacher_epochs", "1", "--training_parameters.n_epochs", "2"),
    *("--training_parameters.train_steps_per_epoch", "8"),
)


def accuracies(run_directory: Path, model: str) -> list[float]:
    """Of each validation."""
    log = (run_directory / "metrics.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in log.splitlines()]
    name = f"val/{model}_accuracy"
    return [row[name] for row in rows if name in row]


@pytest.mark.slow
@pytest.mark.parametrize(
    "kill_at", [pytest.param(7, id="teacher_learns"), pytest.param(13, id="student_learns")]
)
def test_a_run_killed_in_either_phase_ends_like_one_that_was_not(
    tmp_path: Path, kill_at: int
) -> None:
    output, whole = assert_resumes_exactly(
        tmp_path, SCRIPT, *SHORT, "--checkpoint_parameters.every_n_steps", "3", kill_at=kill_at
    )

    assert output.count("the teacher is frozen") == 1
    teacher, student = accuracies(whole, "teacher"), accuracies(whole, "student")
    assert teacher[0] == teacher[1]
    assert student[0] != student[1]


@pytest.mark.slow
def test_with_its_teacher_the_student_learns_more_than_from_its_few_labels_alone(
    tmp_path: Path,
) -> None:
    options = ("--seed", "0", "--teacher_epochs", "2", "--training_parameters.n_epochs", "8")
    for name, soft_weight in (("taught", "0.5"), ("alone", "0")):
        run(
            tmp_path,
            SCRIPT,
            *("fit", "--root_dir", "runs", "--experiment", name, *options),
            *("--soft_weight", soft_weight),
        )

    taught, alone = (accuracies(one_run(tmp_path, name), "student") for name in ("taught", "alone"))
    assert taught[0] < 0.3
    assert taught[-1] > 0.8
    assert taught[-1] > alone[-1] + 0.03
    assert accuracies(one_run(tmp_path, "taught"), "teacher")[-1] > 0.95


@pytest.mark.slow
def test_a_trained_teacher_teaches_another_student(tmp_path: Path) -> None:
    common = ("fit", "--root_dir", "runs", "--seed", "0", "--training_parameters.n_epochs", "1")
    run(tmp_path, SCRIPT, *common, "--teacher_epochs", "1", "--experiment", "teacher")
    teacher = one_run(tmp_path, "teacher")

    output = run(
        tmp_path,
        SCRIPT,
        *(*common, "--teacher_epochs", "0", "--experiment", "second", "--student_width", "16"),
        *("--checkpoint_parameters.init_from", teacher),
        *("--checkpoint_parameters.init_rename", '{"student": null}'),
        *("--checkpoint_parameters.init_strict", "false"),
    )

    assert "weights from" in output
    second = one_run(tmp_path, "second")
    assert set(accuracies(second, "teacher")) == {accuracies(teacher, "teacher")[-1]}
    assert "the teacher is frozen" in output


def test_help_lists_the_options_of_the_distillation(tmp_path: Path) -> None:
    output = run(tmp_path, SCRIPT, "fit", "--help")

    for option in ("--teacher_epochs", "--temperature", "--soft_weight", "--student_labels"):
        assert option in output
    assert "Epochs in which the teacher learns" in output
