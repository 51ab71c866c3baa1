"""Pieces of a report page: tables, values, moments."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

#: The style sheet has as many colours of runs.
NUM_COLORS = 8


def table(
    heads: Sequence[str],
    rows: Iterable[Sequence[str]],
    classes: Mapping[int, str] | None = None,
    kind: str = "",
) -> str:
    """Cells are HTML already; columns may have a class."""
    known = classes or {}

    def line(cells: Sequence[str], tag: str) -> str:
        return "".join(
            f'<{tag} class="{known[i]}">{cell}</{tag}>' if i in known else f"<{tag}>{cell}</{tag}>"
            for i, cell in enumerate(cells)
        )

    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    return (
        f'<div class="wide {kind}"><table><thead><tr>{line(heads, "th")}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def told(value: Any) -> str:
    """A value of a configuration in a line."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def run_dot(index: int) -> str:
    """The colour of a run."""
    return f'<i class="run run{index % NUM_COLORS}"></i>'


def clock(seconds: float) -> str:
    """``2026-11-24 04:41:07``, UTC."""
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M:%S")


def moment(saved_at: str | None) -> str:
    """``2026-11-24 04:41`` of a time in ISO 8601."""
    return saved_at[:16].replace("T", " ") if saved_at else ""
