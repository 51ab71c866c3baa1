"""The table in the docs names tests that exist, for every layout."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from layouts import LAYOUTS

HERE = Path(__file__).parent
PAGE = HERE.parent.parent / "docs" / "scale" / "layouts.md"


def rows(text: str, heading: str) -> list[list[str]]:
    """Cells of the table under a header that begins so, without header and rule."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {heading} |"))
    table = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        table.append([cell.strip() for cell in line.strip("|").split("|")])
    return table


def test_every_cell_has_a_test_that_is_collected() -> None:
    text = PAGE.read_text(encoding="utf-8").partition("## What is shown, and where")[2]
    tests = {name: test.strip("`") for name, test, _ in rows(text, "name")}
    cells = {layout.strip("`"): names for layout, *names in rows(text, "layout")}
    assert list(cells) == list(LAYOUTS)
    files = sorted({re.sub("::.*", "", test) for test in tests.values()})
    assert set(files) <= {path.name for path in HERE.glob("test_*.py")}
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    collect = subprocess.run(
        [*command, *files], cwd=HERE, capture_output=True, text=True, check=False, timeout=120
    )
    assert collect.returncode == 0, collect.stdout
    for layout, names in cells.items():
        assert len(names) == 7
        for name in (*names, "rounding", "traps"):
            function = re.escape(tests[name].partition("::")[2])
            found = re.search(rf"::{function}\[(.*-)?{layout}\]$", collect.stdout, re.MULTILINE)
            assert found, (layout, name, tests[name])
