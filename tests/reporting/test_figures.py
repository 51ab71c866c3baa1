"""Figures for notebooks and papers, of what the log says."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import tiny

from dream_trainer.errors import ConfigError
from dream_trainer.loggers import JsonlLog
from dream_trainer.reporting import plot_runs
from dream_trainer.reporting.figures import save_figures
from dream_trainer.reporting.run_view import view_directories

pytestmark = pytest.mark.may_leave("rng")


def points(run: Path, name: str) -> list[tuple[float, float]]:
    rows = JsonlLog(run / "metrics.jsonl").read()
    return [(row["step"], row[name]) for row in rows if name in row]


def test_a_trainer_shows_its_own_curves(tmp_path: Path) -> None:
    trainer = tiny(tmp_path, callbacks={})
    trainer.fit()
    figure = trainer.plot("train/loss", "val/loss")
    train, val = figure.data
    assert (train.name, val.name) == ("train", "val")
    run = Path(trainer.run_directory)
    assert list(zip(train.x, train.y, strict=True)) == points(run, "train/loss")
    assert list(zip(val.x, val.y, strict=True)) == points(run, "val/loss")
    assert {chart.text for chart in trainer.plot().layout.annotations} >= {"loss", "lr"}
    assert trainer.plot("train/loss", log=True).layout.yaxis.type == "log"


def test_a_notebook_gets_what_it_can_show(run: Path) -> None:
    import plotly.io

    figure, before = plot_runs(run), plotly.io.renderers.default
    plotly.io.renderers.default = "plotly_mimetype"
    try:
        shown = figure._repr_mimebundle_()
    finally:
        plotly.io.renderers.default = before
    (kind,) = shown
    assert kind == "application/vnd.plotly.v1+json"
    assert len(shown[kind]["data"]) == len(figure.data) == 3
    assert figure._ipython_display_ is None


def test_each_run_has_its_colour_and_its_name(run: Path) -> None:
    other = shutil.copytree(run, run.parent / "other", symlinks=True)
    traces = plot_runs(run, other, names=["train/loss", "val/loss"]).data
    assert [one.name for one in traces] == [
        "tiny, train", "other, train", "tiny, val", "other, val"
    ]  # fmt: skip
    assert len({one.line.color for one in traces}) == 2


def test_time_is_hours_since_the_run_began(run: Path) -> None:
    (trace,) = plot_runs(run, names=["val/loss"], x="time").data
    assert trace.x[-1] == pytest.approx(38 / 3600)
    (run / "timeline.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"timeline\.jsonl"):
        plot_runs(run, x="time")


def test_a_name_that_is_not_there_is_an_error_with_those_that_are(run: Path) -> None:
    with pytest.raises(ConfigError, match="'loss'; there is: lr/net, train/loss, val/loss"):
        plot_runs(run, names=["loss"])
    with pytest.raises(ConfigError, match="'epoch'"):
        plot_runs(run, x="epoch")  # type: ignore[arg-type]


def test_figures_for_papers_are_the_same_each_time(run: Path, tmp_path: Path) -> None:
    views = view_directories([run], None)
    for kind in ("png", "pdf", "svg"):
        files = save_figures(views, tmp_path / kind, kind)
        assert {"loss", "lr"} <= {path.stem for path in files}
        before = {path: path.read_bytes() for path in files}
        save_figures(views, tmp_path / kind, kind)
        assert {path: path.read_bytes() for path in files} == before
    image = np.asarray(Image.open(tmp_path / "png" / "loss.png").convert("RGB"))
    assert image.shape[1] > 800  # a column of print at 300 dots an inch
    colors = {tuple(color) for color in image.reshape(-1, 3).tolist()}
    assert {(0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)} <= colors
    svg = (tmp_path / "svg" / "loss.svg").read_text()
    assert ">optimizer steps</text>" in svg  # text that can be searched and edited


def test_no_file_but_an_earlier_figure_is_replaced(run: Path, tmp_path: Path) -> None:
    (tmp_path / "loss.png").write_bytes(b"mine")
    with pytest.raises(ConfigError, match=r"loss\.png is there already"):
        save_figures(view_directories([run], None), tmp_path)
    assert [path.name for path in tmp_path.glob("*.png")] == ["loss.png"]


WITHOUT = """
import sys
sys.modules["plotly"] = sys.modules["matplotlib"] = None
from dream_trainer.errors import ConfigError
from dream_trainer.reporting import plot_runs
from dream_trainer.reporting.figures import save_figures
from dream_trainer.reporting.page import write_page
for draw in (lambda: plot_runs("."), lambda: save_figures([], "."), lambda: write_page([], ".")):
    try:
        draw()
    except ConfigError as error:
        print(error)
heavy = {"torch", "lightning", "numpy"} & set(sys.modules)
print("loaded:", sorted(heavy))
"""


def test_without_the_libraries_the_error_names_the_extra() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.count("pip install 'dream-trainer[report]'") == 3
    assert done.stdout.endswith("loaded: []\n")
