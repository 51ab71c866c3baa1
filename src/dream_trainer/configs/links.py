"""Values of a configuration that follow from other values of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Link:
    """A value that the command line takes from another one.

    A trainer has them in ``links``. The target is no option any more.

    Args:
        source: dotted name of an option, ``data.width``; with ``apply_on="instantiate"`` also an
            attribute of the object that an option makes. Several make a tuple, and need `compute`.
        target: dotted name of an option, ``model.init_args.width``.
        compute: makes the target's value of the source's; without it they are equal.
        apply_on: ``"parse"`` takes what was given, ``"instantiate"`` the object made of it.
    """

    source: str | tuple[str, ...]
    target: str
    compute: Callable[..., Any] | None = None
    apply_on: Literal["parse", "instantiate"] = "parse"
