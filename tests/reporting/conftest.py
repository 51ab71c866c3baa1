"""A run to report on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from timelines import killed_run


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return killed_run(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "runs" / "tiny", symlinks=True))
