"""The page is one file that loads nothing, and says of a run what its directory says."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from timelines import write

from dream_trainer.errors import ConfigError
from dream_trainer.loggers import JsonlLog
from dream_trainer.reporting.page import MOST_POINTS, page, write_page
from dream_trainer.reporting.run_view import view_directories

pytestmark = pytest.mark.may_leave("rng")


def page_of(*runs: Path) -> str:
    return page(view_directories(runs, MOST_POINTS))


def data_of(text: str) -> dict[str, Any]:
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text)
    data: dict[str, Any] = json.loads(found)
    return data


def words_of(text: str) -> str:
    """What a reader sees, without scripts and styles."""
    bare = re.sub(r"(?s)<(script|style)\b.*?</\1>", "", text)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", bare))


class Tags(HTMLParser):
    """Elements that are open, and every address that a browser would fetch."""

    VOID = ("meta", "link", "input", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [str(v) for k, v in attrs if k in ("src", "href") and v != "data:,"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_it_is_one_file_and_well_formed(run: Path) -> None:
    text = page_of(run)
    tags = Tags()
    tags.feed(text)
    assert (tags.open, tags.fetched) == ([], [])
    assert len(text) < 3_000_000


def test_the_points_are_those_of_the_log(run: Path) -> None:
    data = data_of(page_of(run))
    rows = JsonlLog(run / "metrics.jsonl").read()
    charts = {chart["title"]: chart for chart in data["charts"]}
    assert [line["name"] for line in charts["loss"]["lines"]] == ["train/loss", "val/loss"]
    for chart in data["charts"]:
        for line in chart["lines"] if chart["kind"] == "logged" else ():
            points = [(row["step"], row[line["name"]]) for row in rows if line["name"] in row]
            assert line["x"] == [step for step, _ in points]
            assert line["y"] == pytest.approx([value for _, value in points], rel=1e-5)
            assert len(line["t"]) == len(points)
    assert {"samples_per_second", "memory", "loader_wait"} <= charts.keys()


def test_restarts_checkpoints_and_the_best_are_marked(run: Path) -> None:
    (found,) = data_of(page_of(run))["runs"]
    assert found["restarts"] == [{"x": 6, "t": 32.0, "text": "start 2, from step-00000006"}]
    best = [mark for mark in found["checkpoints"] if "best" in mark["kinds"]]
    assert len(best) == 1
    rows = JsonlLog(run / "metrics.jsonl").read()
    value, step = min((row["val/loss"], row["step"]) for row in rows if "val/loss" in row)
    assert (found["best"]["x"], found["best"]["metric"]) == (step, "val/loss")
    assert found["best"]["y"] == pytest.approx(value, rel=1e-5)
    assert found["bands"] == [[11.0, 13.0, "lost"], [13.0, 32.0, "down"]]


def test_the_words_tell_where_the_time_went(run: Path) -> None:
    words = words_of(page_of(run))
    for told in (
        "restarts 1",
        "steps done again 3",
        "of 38.0 s became steps that count",
        "start-up 4.0 s 10.5 %",
        "down 17.0 s 44.7 %",
        "step-00000006 6 to 12",
        "no end: killed, or going on",
    ):
        assert told in words


def test_a_run_without_a_timeline_has_curves_over_steps(run: Path) -> None:
    (run / "timeline.jsonl").unlink()
    text = page_of(run)
    data = data_of(text)
    assert all(line["t"] is None for chart in data["charts"] for line in chart["lines"])
    assert data["runs"][0]["restarts"] == []
    assert "No timeline.jsonl" in words_of(text)


def test_several_runs_lie_over_each_other_and_are_compared(run: Path) -> None:
    other = Path(shutil.copytree(run, run.parent / "other", symlinks=True))
    config = other / "config.yaml"
    config.write_text(config.read_text().replace("lr: 0.05", "lr: 5"))
    text = page_of(run.parent)
    data = data_of(text)
    assert [one["label"] for one in data["runs"]] == ["other", "tiny"]
    lines = [(one["run"], one["name"]) for one in data["charts"][0]["lines"]]
    names = ("train/loss", "val/loss")
    assert lines == [(number, name) for name in names for number in (0, 1)]
    assert "Differences Name other tiny lr 5 0.05" in words_of(text)


def test_what_is_wrong_is_told(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as log:
        log.write('{"step": 13, "epoch": 2, "train/loss": "nan"}\nnonsense\n')
    write(run / "timeline.jsonl", '{"time"\n', '{"event": "end"}\n')
    words = words_of(page_of(run))
    assert "Problems" in words
    assert "train/loss: 1 of 13 values are not finite" in words
    assert "metrics.jsonl, line" in words
    assert "timeline.jsonl, line 2: KeyError" in words


def test_names_are_text_whatever_is_in_them(run: Path) -> None:
    evil = "</script><script>alert(1)</script><!--<b>"
    with (run / "metrics.jsonl").open("a") as log:
        log.write(json.dumps({"step": 13, "epoch": 2, evil: 1.0, "val/loss": "-inf"}) + "\n")
    with (run / "config.yaml").open("a") as config:
        config.write(f'evil: "{evil}"\n')
    text = page_of(run)
    assert "<script>alert" not in text
    assert evil in [line["name"] for chart in data_of(text)["charts"] for line in chart["lines"]]
    Tags().feed(text)


def test_nothing_but_an_earlier_report_is_replaced(run: Path, tmp_path: Path) -> None:
    views = view_directories([run], MOST_POINTS)
    path = tmp_path / "new" / "report.html"
    write_page(views, path)
    first = path.read_text()
    write_page(views, path)
    assert path.read_text()[:200] == first[:200]
    path.write_text("<html>mine</html>")
    with pytest.raises(ConfigError, match="no report of ours"):
        write_page(views, path)
    assert path.read_text() == "<html>mine</html>"
    with pytest.raises(ConfigError, match="directory"):
        write_page(views, run)
    assert [one.name for one in path.parent.iterdir()] == ["report.html"]


def test_a_run_without_anything_is_a_page(tmp_path: Path) -> None:
    write(tmp_path / "empty" / "metrics.jsonl")
    text = page_of(tmp_path / "empty")
    assert "Nothing was logged" in text
    assert data_of(text)["charts"] == []
