"""Packages whose names load on first use, so that one light module of them can be had alone."""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any


@contextmanager
def loading() -> Iterator[None]:
    """Around an import that may come after a program has seeded itself.

    rich draws from ``random`` when it is loaded, and Fabric loads rich: the program's next draw
    would depend on whether anybody had loaded them before.
    """
    state = random.getstate()
    try:
        yield
    finally:
        random.setstate(state)


def lazy_names(
    package: str, homes: Mapping[str, str], namespace: dict[str, Any]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a package (PEP 562).

    Args:
        package: its name.
        homes: module below the package -> the names that it defines, with spaces between.
        namespace: ``globals()`` of the package.
    """
    home_of = {name: home for home, names in homes.items() for name in names.split()}

    def get(name: str) -> Any:
        if name not in home_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        with loading():
            value = getattr(importlib.import_module(f"{package}.{home_of[name]}"), name)
        namespace[name] = value
        return value

    return get, lambda: sorted({*namespace, *home_of})
