"""``dream-trainer report``: what a run's directory tells, and how runs compare."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import tiny

from dream_trainer.cli import main
from dream_trainer.loggers import JsonlLog

pytestmark = pytest.mark.may_leave("rng")

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one epoch that was told to do a second one."""
    root = tmp_path_factory.mktemp("runs")
    for n_epochs in (1, 2):
        trainer = tiny(root, n_epochs=n_epochs, monitor="val/loss", callbacks={}, async_save=False)
        trainer.fit()
    return Path(trainer.run_directory)


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    without = shutil.ignore_patterns("report.html")
    return Path(shutil.copytree(original, tmp_path / "runs/tiny", symlinks=True, ignore=without))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A report of several runs is written where one is."""
    monkeypatch.chdir(tmp_path)


def told(capsys: Capture, *words: object) -> list[dict[str, Any]]:
    capsys.readouterr()
    main(["report", *map(str, words), "--json"])
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return found


def test_each_metric_has_its_last_lowest_and_highest_value_with_the_step(
    original: Path, capsys: Capture
) -> None:
    (found,) = told(capsys, original)
    rows = JsonlLog(original / "metrics.jsonl").read()
    assert (found["step"], found["epoch"], found["rows"]) == (12, 2, len(rows))
    assert {"train/loss", "val/loss"} <= found["metrics"].keys()
    for name, metric in found["metrics"].items():
        points = [(row[name], int(row["step"])) for row in rows if name in row]
        values = [value for value, _ in points]
        wanted = {
            "last": points[-1],
            "lowest": points[values.index(min(values))],
            "highest": points[values.index(max(values))],
        }
        assert metric == {"values": len(points)} | {
            key: {"value": value, "step": step} for key, (value, step) in wanted.items()
        }
    main(["report", str(original)])
    text = capsys.readouterr().out
    best = found["metrics"]["val/loss"]["lowest"]
    assert f"best val/loss (min): {best['value']:.6g} at step {best['step']}" in text
    assert text.startswith(f"{original}\n12 steps, 2 epochs completed; written 20")
    assert "step-00000012" in text


def test_a_start_with_another_configuration_is_told(original: Path, capsys: Capture) -> None:
    (found,) = told(capsys, original)
    assert found["config_changes"] == [
        {
            "file": "config.yaml.superseded-1",
            "values": {"training_parameters.n_epochs": [1, 2]},
        }
    ]
    main(["report", str(original)])
    words = "started again with another configuration: training_parameters.n_epochs 1 -> 2"
    assert words in capsys.readouterr().out


def test_several_runs_are_compared(original: Path, run: Path, capsys: Capture) -> None:
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("lr: 0.05", "lr: 5"))
    with (run / "metrics.jsonl").open("a") as log:
        log.write('{"step": 13, "epoch": 2, "mine": 4.5}\n')
    main(["report", str(original), str(run)])
    lines = capsys.readouterr().out.splitlines()
    at = lines.index("Configuration: 1 difference")
    assert lines[at + 2].split() == ["lr", "0.05", "5"]
    assert [line.split() for line in lines if line.startswith("mine  ")][-1] == [
        "mine", "last", "-", "4.5", "at", "13"
    ]  # fmt: skip


def test_what_cannot_be_read_is_told_and_the_rest_reported(run: Path, capsys: Capture) -> None:
    log = run / "metrics.jsonl"
    log.write_text(
        '{"step": 1, "epoch": 0, "a": 2.0}\n{"step": 2, "epoch": 0, "a": "nan"}\n{"step": 3, "ep'
    )
    (run / "metrics.jsonl.superseded-1").write_text("")
    (run / "config.yaml").write_text("a: [")
    (found,) = told(capsys, run)
    assert found["problems"] == []  # the half row is being written
    assert found["metrics"]["a"] == {
        "values": 2,
        "last": {"value": "nan", "step": 2},
        "lowest": {"value": 2.0, "step": 1},
        "highest": {"value": 2.0, "step": 1},
    }
    assert found["config"] is None
    assert found["logs_set_aside"] == ["metrics.jsonl.superseded-1"]
    log.write_text('{"step": 1, "epoch": 0, "a": 2.0}\nnonsense\n')
    (found,) = told(capsys, run)
    assert found["problems"][0].startswith("metrics.jsonl, line 2: ")
    main(["report", str(run), str(run)])
    text = capsys.readouterr().out
    assert "not read: metrics.jsonl, line 2" in text
    assert "Configurations are not compared" in text


@pytest.mark.parametrize("name", ["metrics.jsonl", "timeline.jsonl"])
@pytest.mark.parametrize("deep", [True, False], ids=["nested without end", "no file"])
def test_a_log_that_no_program_can_read_is_a_problem_of_the_run(
    run: Path, capsys: Capture, name: str, deep: bool
) -> None:
    (run / name).unlink()
    if deep:
        (run / name).write_text("[" * 100_000 + "\n" + '{"step": 1}\n')
    else:
        (run / name).mkdir()
    (found,) = told(capsys, run)
    assert any(one.startswith(name) for one in found["problems"])


def test_a_wrong_path_ends_with_2(original: Path, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as end:
        main(["report", str(original.with_name("tin"))])
    assert end.value.code == 2
    assert f"did you mean {original}?" in capsys.readouterr().err


def test_rows_are_read_while_another_process_writes(tmp_path: Path) -> None:
    log = JsonlLog(tmp_path / "metrics.jsonl")
    log.write([{"step": 1, "a": math.inf}])
    with log.path.open("a") as file:
        file.write('{"step": 2')
    assert log.read() == [{"step": 1, "a": math.inf}]
    log.close()


def test_the_page_lies_in_the_directory_of_the_run_and_the_last_line_says_so(
    run: Path, capsys: Capture
) -> None:
    main(["report", str(run)])
    page = run / "report.html"
    assert capsys.readouterr().out.splitlines()[-1] == str(page)
    assert "<title>tiny</title>" in page.read_text()
    main(["report", str(run), "--output", "there/mine.html"])
    assert capsys.readouterr().out.splitlines()[-1] == "there/mine.html"
    assert Path("there/mine.html").exists()


def test_the_page_of_several_runs_lies_here(original: Path, run: Path, capsys: Capture) -> None:
    main(["report", str(original), str(run)])
    assert capsys.readouterr().out.splitlines()[-1] == "report.html"
    assert "<title>2 runs</title>" in Path("report.html").read_text()


@pytest.mark.parametrize("words", [["--json"], ["--no-html"]])
def test_no_page_is_written_where_none_is_wanted(run: Path, words: list[str]) -> None:
    main(["report", str(run), *words])
    assert not list(Path().rglob("*.html"))


def test_with_json_a_page_is_written_if_it_is_asked_for(run: Path, capsys: Capture) -> None:
    assert told(capsys, run, "--output", "it.html")[0]["step"] == 12
    assert Path("it.html").exists()


def test_a_file_of_somebody_else_stays_and_the_words_are_told(run: Path, capsys: Capture) -> None:
    page = run / "report.html"
    page.write_text("mine")
    with pytest.raises(SystemExit) as end:
        main(["report", str(run)])
    told = capsys.readouterr()
    assert end.value.code == 2
    assert page.read_text() == "mine"
    assert "12 steps, 2 epochs completed" in told.out
    assert "no report of ours" in told.err
    assert "--output" in told.err


def test_without_plotly_the_words_are_told_and_the_extra_named(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setitem(sys.modules, "plotly", None)
    main(["report", str(run)])
    out = capsys.readouterr().out
    assert "12 steps, 2 epochs completed" in out
    assert "pip install 'dream-trainer[report]'" in out.splitlines()[-1]
    with pytest.raises(SystemExit):
        main(["report", str(run), "--output", "it.html"])
    assert "dream-trainer[report]" in capsys.readouterr().err


def test_figures_go_into_a_folder_and_are_listed(run: Path, capsys: Capture) -> None:
    main(["report", str(run), "--no-html", "--png", "figures", "--log"])
    lines = capsys.readouterr().out.splitlines()
    assert {"figures/loss.png", "figures/lr.png"} <= set(lines)
    assert {path.name for path in Path("figures").iterdir()} >= {"loss.png", "lr.png"}


def test_a_page_needs_no_torch(run: Path) -> None:
    program = (
        "import sys\n"
        "from dream_trainer.cli import main\n"
        "main(['report', sys.argv[1]])\n"
        "assert not {'torch', 'lightning', 'matplotlib', 'pandas'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(run)], check=True, timeout=120)
    assert (run / "report.html").exists()


def test_where_the_time_went_is_told(run: Path, capsys: Capture) -> None:
    lines = [
        {"event": "start", "time": 0, "began": 0, "step": 0, "resumed_from": None},
        {"event": "progress", "time": 10, "step": 10, "seconds": {"train": 9, "loader": 1}},
        {"event": "start", "time": 20, "began": 15, "step": 5, "resumed_from": "step-00000005"},
        {"event": "progress", "time": 30, "step": 12, "seconds": {"train": 10}},
        {"event": "end", "time": 30, "step": 12, "status": "stopped", "reason": "enough"},
    ]
    text = "".join(json.dumps(one) + "\n" for one in lines)
    (run / "timeline.jsonl").write_text(text)
    main(["report", str(run), "--no-html"])
    out = capsys.readouterr().out
    assert (
        "goodput 48.3 % of 30.0 s; start-up 16.7 %, lost 16.7 %, down 16.7 %, loader 1.7 %\n"
        "1 restart; 5 steps done again\n"
        "stopped: enough\n"
    ) in out
    (found,) = told(capsys, run)
    goodput = found["goodput"]
    assert (goodput["share"], goodput["wall_seconds"]) == (round(14.5 / 30, 6), 30)
    assert sum(goodput["seconds"].values()) == 30
    assert [one["lost_steps"] for one in goodput["attempts"]] == [5, 0]
