"""The program behind the README's table."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cells
import pytest

from dream_trainer import DreamTrainer


def test_a_row_of_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert cells.main(["--only", "both"]) == 0
    _, _, header, row, _, result = capsys.readouterr().out.splitlines()
    assert header.split() == ["0", "workers", "2", "workers"]
    assert row.split() == ["both", "exact", "exact"]
    assert result.startswith("2 of 2 cells exact")


def test_a_cell_that_is_not_exact(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def forget(self: DreamTrainer, state: Mapping[str, Any], strict: bool = True) -> None:
        DreamTrainer.load_state_dict(self, {**state, "rng": {}}, strict)

    monkeypatch.setattr(cells.CellTrainer, "load_state_dict", forget)
    monkeypatch.setattr(cells, "WORKERS", (0,))
    assert cells.main(["--only", "dropout"]) == 1
    assert "0 of 1 cells exact" in capsys.readouterr().out


@pytest.mark.faults
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_table(ranks: int) -> None:
    program = str(Path(cells.__file__))
    command = [sys.executable, program, "--ranks", str(ranks)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "8 of 8 cells exact" in result.stdout
