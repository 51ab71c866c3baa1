"""A folder of its own with a program in it."""

from __future__ import annotations

from pathlib import Path

import pytest
from programs import TRAIN, write


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write("train.py", TRAIN)
