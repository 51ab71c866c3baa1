"""A folder of its own with a program in it, and the server that runs programs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import programs
import pytest


@pytest.fixture(scope="session")
def server() -> Iterator[None]:
    programs.server()
    yield
    programs.server().end()


@pytest.fixture
def program(server: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    programs.write("train.py", programs.TRAIN)
