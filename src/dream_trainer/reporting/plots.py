"""Curves of runs as an interactive figure, for notebooks and scripts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dream_trainer.errors import ConfigError
from dream_trainer.reporting.curves import PHASES, Chart, Curve
from dream_trainer.reporting.run_view import RunView, charts_of, view_directories

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

#: Blue, vermilion, green, purple, orange, light blue: told apart by nearly all eyes
#: (Okabe and Ito, 2008, Color Universal Design).
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MOST_POINTS = 4000
_HEIGHT = 260

Axis = Literal["step", "time"]


def plot_runs(
    *directories: str | Path,
    names: Sequence[str] = (),
    x: Axis = "step",
    log: bool = False,
) -> Figure:
    """Draw the metrics of runs; train and validation of one quantity share a chart.

    In a notebook the figure shows itself as the last value of a cell; ``show()`` opens a browser,
    ``write_html`` and ``write_json`` keep it. Curves of more than 4,000 values keep the lowest
    and the highest of equal parts.

    Args:
        directories: runs, or directories of runs; each run gets a colour.
        names: metrics, ``"train/loss"`` for example; all if empty.
        x: optimizer steps, or hours since the run began, for which its timeline is needed.
        log: logarithmic values.

    Returns:
        A plotly figure. It belongs to the caller and can be changed.

    Raises:
        ConfigError: a path leads to no run, no run has a metric of such a name, there is no
            timeline to draw over time, or plotly is not installed.
    """
    try:
        from plotly.subplots import make_subplots
    except ImportError:
        raise ConfigError(
            "plot", ["plotly is not installed"], "pip install 'dream-trainer[report]'"
        ) from None
    views = view_directories(directories, _MOST_POINTS)
    charts = wanted_charts(views, names, x)
    columns = min(len(charts), 2)
    rows = math.ceil(len(charts) / columns)
    figure = make_subplots(
        rows, columns, subplot_titles=[one.title for one in charts], vertical_spacing=0.3 / rows
    )
    for index, chart in enumerate(charts):
        row, column = divmod(index, columns)
        for run, part, curve in lines_of(views, chart):
            trace = _trace(views, chart, run, part, curve, x, is_first=not index)
            figure.add_scatter(**trace, row=row + 1, col=column + 1)
        figure.update_xaxes(title_text=AXES[x], row=row + 1, col=column + 1)
    if log:
        figure.update_yaxes(type="log")
    figure.update_layout(
        height=_HEIGHT * rows + 80,
        hovermode="x unified",
        template="plotly_white",
        margin={"l": 50, "r": 20, "t": 50, "b": 50},
    )
    # It needs nbformat in the kernel's environment; what a notebook shows otherwise needs nothing.
    figure._ipython_display_ = None
    return figure


AXES = {"step": "optimizer steps", "time": "hours"}


def wanted_charts(views: Sequence[RunView], names: Sequence[str], x: Axis) -> list[Chart]:
    """The charts that were asked for.

    Raises:
        ConfigError: there is nothing to draw, or no timeline to draw it over.
    """
    problems = []
    there = sorted({name for view in views for name in view.logged})
    problems += [
        f"no run has {name!r}; there is: {', '.join(there) or 'nothing'}"
        for name in names
        if name not in there
    ]
    if not there:
        problems.append("nothing was logged")
    if x not in AXES:
        problems.append(f"x is {x!r}, expected 'step' or 'time'")
    if x == "time":
        problems += [
            f"{view.label} has no timeline.jsonl, which tells when steps were done"
            for view in views
            if view.report.goodput is None
        ]
    if problems:
        raise ConfigError("plot", problems)
    return charts_of([view.logged for view in views], names)


def lines_of(views: Sequence[RunView], chart: Chart) -> Iterator[tuple[int, str, Curve]]:
    """Number of the run, part and curve of each line of a chart."""
    for name, part in chart.lines.items():
        for run, view in enumerate(views):
            if name in view.logged:
                yield run, part, view.logged[name]


def color_of(views: Sequence[RunView], chart: Chart, run: int, part: str) -> str:
    """Of several runs each has a colour; of one each part has."""
    parts = list(dict.fromkeys(chart.lines.values()))
    own = PHASES.index(part) if part in PHASES else parts.index(part)
    return COLORS[(run if len(views) > 1 else own) % len(COLORS)]


def along(curve: Curve, x: Axis) -> Any:
    """Where the points of a curve lie."""
    if x == "step" or curve.seconds is None:
        return curve.steps
    return curve.seconds / 3600


def name_of(views: Sequence[RunView], chart: Chart, run: int, part: str) -> str:
    """What a line is called in a legend."""
    label = views[run].label
    if len(views) == 1:
        return part
    return label if len(set(chart.lines.values())) == 1 else f"{label}, {part}"


def _trace(
    views: Sequence[RunView],
    chart: Chart,
    run: int,
    part: str,
    curve: Curve,
    x: Axis,
    is_first: bool,
) -> dict[str, Any]:
    name = name_of(views, chart, run, part)
    is_train = part == "train" and len(chart.lines) > 1
    return {
        "x": along(curve, x),
        "y": curve.values,
        "name": name,
        "legendgroup": name,
        "showlegend": is_first or part not in PHASES,
        "mode": "lines" if len(curve.steps) > 60 else "lines+markers",
        "line": {
            "color": color_of(views, chart, run, part),
            "width": 1.2 if is_train else 2.2,
        },
        "opacity": 0.6 if is_train and len(views) > 1 else 1.0,
    }
