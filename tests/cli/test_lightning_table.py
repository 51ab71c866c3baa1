"""The table of the behaviours that Lightning's tests of its CLI check: each cell has its test."""

from __future__ import annotations

import ast
import re
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "lightning_cli.md"


def test_every_test_that_the_table_names_is_there() -> None:
    named = re.findall(r"`(\w+)::(\w+)` \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(named) > 30
    for module, name in named:
        tree = ast.parse((HERE / f"test_{module}.py").read_text(encoding="utf-8"))
        there = {one.name for one in tree.body if isinstance(one, ast.FunctionDef)}
        assert f"test_{name}" in there, (module, name)
