"""Packages whose names load on first use offer the same names as any other package."""

from __future__ import annotations

import importlib

import pytest

LAZY = ("dream_trainer.checkpointing", "dream_trainer.storage")


@pytest.mark.parametrize("package", LAZY)
def test_every_name_loads_and_is_listed(package: str) -> None:
    module = importlib.import_module(package)
    assert set(module.__all__) <= set(dir(module))
    assert [name for name in module.__all__ if getattr(module, name, None) is None] == []


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    module = importlib.import_module("dream_trainer.storage")
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        _ = module.nope
