"""``benchmark``, ``profile`` and ``find-graph-breaks`` on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import TinyTrainer

from dream_trainer.cli import DreamCLI

OPTIONS = ["--training_parameters.n_epochs", "2"]


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_benchmark_prints_a_short_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["benchmark", "--steps", "4", "--warmup", "1", "--cached-batch"]
    cli = DreamCLI(TinyTrainer, [*words, *OPTIONS])
    assert [one.is_cached for one in cli.result] == [False, True]
    said = capsys.readouterr().out.splitlines()
    assert said[0].split() == ["batches", "steps/s", "ms/step", "samples/s"]
    assert [line[:10] for line in said[1:3]] == ["loader's  ", "the same  "]
    assert said[3:] == ["4 steps after 1 to warm up, 1 rank, cpu"]
    assert list(tmp_path.iterdir()) == []


def test_profile_writes_into_the_run_directory_and_fit_goes_on_there(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["profile", "--steps", "1", "--warmup", "4", *OPTIONS]
    cli = DreamCLI(TinyTrainer, [*words, "--shapes"])
    said = capsys.readouterr().out
    assert said.startswith("where the time of a step goes")
    assert f"trace: {cli.result.trace}" in said
    folder = tmp_path / "runs/default/default/tiny"
    assert cli.result.trace.parent == folder / "profile"
    assert [path.name for path in folder.iterdir()] == ["profile"]
    DreamCLI(TinyTrainer, ["fit", *OPTIONS])
    assert (folder / "metrics.jsonl").exists()


def test_profile_writes_where_it_is_told(tmp_path: Path) -> None:
    words = ["profile", "--steps", "1", "--warmup", "1", "--output", "elsewhere", *OPTIONS]
    DreamCLI(TinyTrainer, words)
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]


def test_profile_of_a_run_without_a_name_makes_no_run_directory(tmp_path: Path) -> None:
    words = ["profile", "--steps", "1", "--warmup", "1", "--experiment", "null", *OPTIONS]
    DreamCLI(TinyTrainer, words)
    assert [path.name for path in tmp_path.iterdir()] == ["profile"]


def test_find_graph_breaks_prints_its_report(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    cli = DreamCLI(TinyTrainer, ["find-graph-breaks", "--batches", "3", *OPTIONS])
    assert capsys.readouterr().out == f"{cli.result}\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["benchmark", "--steps", "0"], "benchmark: steps is 0, and must be above 0"),
        (["profile", "--steps", "many"], "--steps: invalid int value: 'many'"),
        (["find-graph-breaks", "--batches", "1"], "batches is 1, and must be at least 3"),
    ],
)
def test_a_mistake_is_a_short_message(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        DreamCLI(TinyTrainer, [*words, *OPTIONS], prog="train.py {}")
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert told in said
    assert len(said.splitlines()) <= 2
