"""A report as one HTML file, which loads nothing from anywhere."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Sequence
from datetime import datetime, timezone
from html import escape
from importlib import resources
from importlib.util import find_spec
from pathlib import Path

from dream_trainer.errors import ConfigError
from dream_trainer.reporting.page_config import checkpoint_section, config_section
from dream_trainer.reporting.page_data import page_data
from dream_trainer.reporting.page_summary import cards, problem_section
from dream_trainer.reporting.page_time import time_section
from dream_trainer.reporting.run_view import RunView
from dream_trainer.storage.atomic import write_text
from dream_trainer.words import counted

#: Points of a curve on a page: about twice as many as a wide screen has columns.
MOST_POINTS = 4000
_SIGN = "<!-- written by dream-trainer report -->"
#: What a browser may do with the page: nothing but what is in it.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data: blob:; font-src data:"
)


def has_plotly() -> bool:
    """Whether what the curves are drawn with is installed; it is not loaded."""
    return find_spec("plotly") is not None


def require_plotly() -> None:
    """Raises ConfigError if what the curves are drawn with is not installed."""
    if not has_plotly():
        raise ConfigError(
            "dream-trainer report",
            ["plotly, which draws the curves, is not installed"],
            "pip install 'dream-trainer[report]', or --no-html.",
        )


def require_free(path: Path) -> None:
    """Raises ConfigError if something is there that is no report of ours."""
    if path.is_dir():
        raise ConfigError(str(path), ["it is a directory"], "Give a file with --output.")
    if not path.exists():
        return
    with path.open("rb") as file:
        head = file.read(500)
    if _SIGN.encode() not in head:
        raise ConfigError(
            str(path),
            ["is there already, and no report of ours"],
            "Choose another --output, or move it.",
        )


def write_page(views: Sequence[RunView], path: Path) -> None:
    """Write the report of runs; an earlier one is replaced.

    Args:
        views: of runs, read with at most `MOST_POINTS` a curve.
        path: of the file.

    Raises:
        ConfigError: plotly is missing, or something else is there.
    """
    require_plotly()
    require_free(path)
    write_text(path, page(views))


def page(views: Sequence[RunView]) -> str:
    """The text of the file."""
    title = views[0].label if len(views) == 1 else f"{len(views)} runs"
    written = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    sections = [
        cards(views),
        problem_section(views),
        _CURVES if any(view.logged for view in views) else "<p>Nothing was logged.</p>",
        time_section(views),
        config_section(views),
        checkpoint_section(views),
    ]
    # A "<" in a name could end the element.
    data = json.dumps(page_data(views), separators=(",", ":"), allow_nan=False)
    data = data.replace("<", "\\u003c")
    return f"""<!doctype html>
{_SIGN}
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>
{_asset("report.css")}</style>
</head>
<body>
<header><h1>{escape(title)}</h1>
<button id="theme" type="button" title="light or dark">&#9680;</button></header>
<main>
{"".join(sections)}</main>
<footer>Written {written}.{_thinned(views)} Drawn with plotly.js (MIT licence).</footer>
<script type="application/json" id="data">{data}</script>
<script type="application/octet-stream" id="plotly">{_packed_plotly()}</script>
<script>
{_asset("report.js")}</script>
</body>
</html>
"""


_CURVES = """<section id="curves"><h2>Curves</h2>
<div class="tools" role="toolbar">
<span class="switch" id="axis"><button type="button" data-axis="x" aria-pressed="true">steps\
</button><button type="button" data-axis="t" aria-pressed="false">time</button></span>
<label>smooth <input id="smooth" type="range" min="0" max="0.99" step="0.01" value="0">\
<output id="smoothed">0</output></label>
<label><input id="log" type="checkbox"> log scale</label>
<label title="triangles: restarts above, checkpoints below; star: the best one; ring: the best \
value"><input id="marks" type="checkbox"> restarts, checkpoints</label>
<input id="find" type="search" placeholder="find a curve" aria-label="find a curve">
<span id="legend"></span>
</div>
<div class="charts" id="charts"></div>
<noscript>The curves need JavaScript.</noscript>
</section>
"""


def _thinned(views: Sequence[RunView]) -> str:
    curves = [one for view in views for one in view.logged.values() if one.means is not None]
    if not curves:
        return " Curves show every value that was logged."
    longest = max(one.num_values for one in curves)
    return (
        f" {counted(len(curves), 'curve')} of up to {longest:,} values are thinned: the lowest and "
        f"the highest of each of {MOST_POINTS // 2:,} equal parts are shown. Smoothing starts from "
        "the means of the parts."
    )


def _packed_plotly() -> str:
    from plotly.offline import get_plotlyjs

    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode()


def _asset(name: str) -> str:
    return resources.files("dream_trainer.reporting").joinpath(f"assets/{name}").read_text("utf-8")
