"""The table in the docs names tests that exist, for every layout."""

from __future__ import annotations

import ast
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


def test_every_cell_has_a_test_that_runs_for_it() -> None:
    text = PAGE.read_text(encoding="utf-8").partition("## What is shown, and where")[2]
    tests = {name: test.strip("`") for name, test, _ in rows(text, "name")}
    cells = {layout.strip("`"): names for layout, *names in rows(text, "layout")}
    assert list(cells) == list(LAYOUTS)
    for layout, names in cells.items():
        assert len(names) == 7
        for name in (*names, "rounding", "traps"):
            file, _, function = tests[name].partition("::")
            assert layout in layouts_of(HERE / file, function), (layout, name, tests[name])


def layouts_of(file: Path, function: str) -> set[str]:
    """The layouts that a test function is parametrized with; none if it is not there."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name == function:
            is_for_all = 'parametrize("layout", LAYOUTS' in "".join(
                ast.unparse(one).replace("'", '"') for one in node.decorator_list
            )
            return set(LAYOUTS) if is_for_all else set()
    return set()
