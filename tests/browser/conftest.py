"""One browser for all tests: it takes a second to start."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from browsers import Browser, chromium


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with chromium() as made:
        yield made
