"""The numbers in the documentation are those that the benchmarks wrote."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent / "benchmarks"


@pytest.fixture
def publish(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import publish

    yield publish
    for name in ("publish", "rounds"):
        sys.modules.pop(name, None)


def test_every_table_of_numbers_is_what_the_benchmarks_found(publish: Any) -> None:
    found, pages = publish.read(), sorted(publish.DOCS.rglob("*.md"))
    tables = [name for page in pages for name in publish.names(page.read_text(encoding="utf-8"))]
    assert set(tables) == set(publish.TABLES)
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert publish.with_tables(text, found) == text, f"{page}: run tests/benchmarks/publish.py"


def test_every_benchmark_has_numbers(publish: Any) -> None:
    assert set(publish.read()) == {path.stem[6:] for path in BENCHMARKS.glob("bench_*.py")}
