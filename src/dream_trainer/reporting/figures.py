"""Curves of runs as files for papers: PNG, PDF or SVG, one for each chart."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from dream_trainer.errors import ConfigError
from dream_trainer.reporting.curves import Chart
from dream_trainer.reporting.plots import (
    AXES,
    Axis,
    along,
    color_of,
    lines_of,
    name_of,
    wanted_charts,
)
from dream_trainer.reporting.run_view import RunView
from dream_trainer.storage import atomic_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = ("png", "pdf", "svg")
#: Points of a curve: more than a column of print can show.
MOST_POINTS = 4000
#: Inches: one column of most journals, a legend beside it left aside.
_SIZE = (3.4, 2.4)
_STYLE: dict[str, Any] = {
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.labelsize": 8,
    "legend.fontsize": 7,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.linewidth": 0.4,
    "grid.alpha": 0.4,
    # Text stays text, in fonts that printers and journals accept.
    "pdf.fonttype": 42,
    "svg.fonttype": "none",
    "svg.hashsalt": "dream_trainer",
}
_SAVED: dict[str, Any] = {"dpi": 300, "bbox_inches": "tight", "pad_inches": 0.03}
_SIGN = b"dream-trainer report"
#: Without a date the same run gives the same file.
_METADATA: dict[str, dict[str, Any]] = {
    "png": {"Software": _SIGN.decode()},
    "pdf": {"Creator": _SIGN.decode(), "CreationDate": None},
    "svg": {"Creator": _SIGN.decode(), "Date": None},
}
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")
_MARKS = ("o", "s", "^", "D", "v", "P")


def save_figures(
    views: Sequence[RunView],
    folder: Path,
    kind: str = "png",
    names: Sequence[str] = (),
    x: Axis = "step",
    log: bool = False,
) -> list[Path]:
    """Draw each chart into a file of its own, named for what it shows.

    Colours can be told apart by nearly all eyes, lines of several runs by their marks too; the
    legend lies outside. Earlier figures are replaced, other files are not.

    Args:
        views: of runs.
        folder: made if it is not there.
        kind: one of `KINDS`.
        names: metrics; all if empty.
        x: optimizer steps, or hours since the run began.
        log: logarithmic values.

    Returns:
        The files.

    Raises:
        ConfigError: there is nothing to draw, or matplotlib is not installed, or
            another file has the name of one.
    """
    try:
        import matplotlib
    except ImportError:
        raise ConfigError(
            f"--{kind}", ["matplotlib is not installed"], "pip install 'dream-trainer[report]'"
        ) from None
    if folder.exists() and not folder.is_dir():
        raise ConfigError(str(folder), ["it is a file"], f"Give a folder with --{kind}.")
    charts = wanted_charts(views, names, x)
    files = [folder / f"{_UNSAFE.sub('-', chart.title)}.{kind}" for chart in charts]
    foreign = [path.name for path in files if path.exists() and _SIGN not in path.read_bytes()]
    if foreign:
        raise ConfigError(
            str(folder),
            [f"{name} is there already, and no figure of ours" for name in foreign],
            "Choose another folder, or move them.",
        )
    with matplotlib.rc_context(cast(Any, _STYLE)):
        for chart, path in zip(charts, files, strict=True):
            figure = _figure(views, chart, x, "log" if log else "linear")
            with atomic_file(path) as beside:
                figure.savefig(beside, format=kind, metadata=_METADATA[kind], **_SAVED)
    return files


def _figure(views: Sequence[RunView], chart: Chart, x: Axis, scale: str) -> Figure:
    # Without pyplot: nothing of the caller's is touched, and no window opens.
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.add_subplot()
    lines = list(lines_of(views, chart))
    for run, part, curve in lines:
        color = color_of(views, chart, run, part)
        is_train = part == "train" and len(set(chart.lines.values())) > 1
        has_marks = len(curve.steps) <= 60 or (len(views) > 1 and not is_train)
        axes.plot(
            along(curve, x),
            curve.values,
            label=name_of(views, chart, run, part),
            color=color,
            linewidth=0.7 if is_train else 1.3,
            alpha=0.55 if is_train and len(views) > 1 else 1.0,
            marker=_MARKS[run % len(_MARKS)] if has_marks else None,
            markersize=2.5,
            markevery=max(1, len(curve.steps) // 12),
        )
    axes.set(xlabel=AXES[x], ylabel=chart.title.replace("_", " "), yscale=scale)
    axes.grid(True)
    if len(lines) > 1:
        figure.legend(loc="outside right upper", frameon=False, handlelength=1.6)
    return figure
