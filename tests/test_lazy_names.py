"""Packages whose names load on first use offer the same names as any other package."""

from __future__ import annotations

import importlib
import random
from pathlib import Path

import pytest

from dream_trainer.lazy_names import lazy_names

LAZY = ("dream_trainer.checkpointing", "dream_trainer.storage", "dream_trainer.world")


@pytest.mark.parametrize("package", LAZY)
def test_every_name_loads_and_is_listed(package: str) -> None:
    module = importlib.import_module(package)
    assert set(module.__all__) <= set(dir(module))
    assert [name for name in module.__all__ if getattr(module, name, None) is None] == []


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    module = importlib.import_module("dream_trainer.storage")
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        _ = module.nope


def test_what_a_late_import_draws_is_not_missing_in_the_programs_random_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "late_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "drawing.py").write_text("import random\nDRAWN = random.random()\n")
    monkeypatch.syspath_prepend(tmp_path)
    get, _ = lazy_names("late_package", {"drawing": "DRAWN"}, {})
    before = random.getstate()
    assert isinstance(get("DRAWN"), float)
    assert random.getstate() == before
