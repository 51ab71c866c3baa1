"""``dream-trainer report``: what a run's directory tells, and how runs compare."""

from __future__ import annotations

import json
import math
import shutil
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
    return Path(shutil.copytree(original, tmp_path / "runs" / "tiny", symlinks=True))


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
