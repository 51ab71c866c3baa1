"""What the script of a report page draws: plain data, as short as it can be written."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dream_trainer.reporting.curves import Curve
from dream_trainer.reporting.run_view import Mark, RunView, charts_of

if TYPE_CHECKING:
    from dream_trainer.reporting.curves import Array

#: Six digits: more than a screen shows.
_DIGITS = ".6g"


def page_data(views: Sequence[RunView]) -> dict[str, Any]:
    """Runs and charts; points are lists of x and y side by side, None where nothing is drawn."""
    return {
        "runs": [_run(view) for view in views],
        "charts": [
            *_charts([view.logged for view in views], "logged"),
            *_charts([view.measured for view in views], "measured"),
        ],
    }


def _run(view: RunView) -> dict[str, Any]:
    return {
        "label": view.label,
        "restarts": [_mark(one) for one in view.restarts],
        "checkpoints": [{**_mark(mark), "kinds": list(kinds)} for mark, kinds in view.checkpoints],
        "best": view.best and _best(view, *view.best),
        "bands": _bands(view),
    }


def _mark(mark: Mark) -> dict[str, Any]:
    return {"x": mark.step, "t": mark.seconds, "text": mark.text}


def _best(view: RunView, mark: Mark, value: float) -> dict[str, Any]:
    return {
        **_mark(mark),
        "y": _short(value) if math.isfinite(value) else None,
        "metric": view.report.monitor,
    }


def _bands(view: RunView) -> list[tuple[float, float, str]]:
    """Times in which nothing was won."""
    goodput = view.report.goodput
    if goodput is None:
        return []
    begin = goodput.attempts[0].began
    bands = []
    for before, after in zip(goodput.attempts, goodput.attempts[1:], strict=False):
        bands.append((before.counted_until - begin, before.ended - begin, "lost"))
        bands.append((before.ended - begin, after.started - begin, "down"))
    return [band for band in bands if band[1] > band[0]]


def _charts(curves: Sequence[Mapping[str, Curve]], kind: str) -> list[dict[str, Any]]:
    return [
        {
            "title": chart.title,
            "kind": kind,
            "lines": [
                {"run": index, "name": name, "part": part, **_points(of_run[name])}
                for name, part in chart.lines.items()
                for index, of_run in enumerate(curves)
                if name in of_run
            ],
        }
        for chart in charts_of(curves)
    ]


def _points(curve: Curve) -> dict[str, Any]:
    found: dict[str, Any] = {
        "x": _numbers(curve.steps),
        "y": _numbers(curve.values),
        "t": None if curve.seconds is None else _numbers(curve.seconds),
        "count": curve.num_values,
        "bad": curve.num_not_finite,
    }
    if curve.means is not None:
        steps, means, seconds = curve.means
        found["means"] = {
            "x": _numbers(steps),
            "y": _numbers(means),
            "t": None if seconds is None else _numbers(seconds),
        }
    return found


def _numbers(values: Array) -> list[float | None]:
    """As JSON knows them; whole numbers without their point."""
    return [
        None if value != value else int(value) if value.is_integer() else _short(value)
        for value in values.tolist()
    ]


def _short(value: float) -> float:
    return float(format(value, _DIGITS))
