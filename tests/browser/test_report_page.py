"""The page of a report in a browser: it draws, its switches work, it asks nobody for anything."""

from __future__ import annotations

import base64
import shutil
from pathlib import Path
from typing import Any

import pytest
from browsers import Browser
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from timelines import killed_run

from dream_trainer.loggers import JsonlLog
from dream_trainer.reporting.page import MOST_POINTS, write_page
from dream_trainer.reporting.run_view import view_directories

# What the browser and its driver are made of stays until the last test.
pytestmark = pytest.mark.may_leave("rng", "process", "thread", "port")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three: of one another learning rate, of one no timeline."""
    first = killed_run(tmp_path_factory.mktemp("runs"))
    second = Path(shutil.copytree(first, first.parent / "second", symlinks=True))
    third = Path(shutil.copytree(first, first.parent / "third", symlinks=True))
    config = second / "config.yaml"
    config.write_text(config.read_text().replace("lr: 0.05", "lr: 5"))
    (third / "timeline.jsonl").unlink()
    return [first, second, third]


@pytest.fixture(scope="module")
def one(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pages") / "one.html"
    write_page(view_directories(runs[:1], MOST_POINTS), path)
    return path


@pytest.fixture(scope="module")
def three(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pages") / "three.html"
    write_page(view_directories(runs, MOST_POINTS), path)
    return path


PLOT = "[...document.querySelectorAll('.chart')].find(c => c.innerText.startsWith('{}'))"


def chart(browser: Browser, title: str, expression: str) -> Any:
    """What an expression of a chart's ``plot`` gives."""
    plot = f"const chart = {PLOT.format(title)}; const plot = chart.querySelector('.plot');"
    return browser.run(f"{plot} return {expression};")


def draw_all(browser: Browser) -> None:
    browser.run("dispatchEvent(new Event('beforeprint')); dispatchEvent(new Event('afterprint'))")
    browser.until("[...document.querySelectorAll('.plot')].every(p => p.querySelector('.trace'))")


def click(browser: Browser, selector: str) -> None:
    browser.run("document.querySelector(arguments[0]).click()", selector)


def slide(browser: Browser, selector: str, value: object) -> None:
    browser.run(
        "const it = document.querySelector(arguments[0]); it.value = arguments[1];"
        "it.dispatchEvent(new Event('input'));",
        selector,
        value,
    )


def test_everything_is_drawn_without_a_complaint_and_without_a_request(
    browser: Browser, one: Path, runs: list[Path]
) -> None:
    browser.requests()
    browser.open(one)
    draw_all(browser)
    assert browser.complaints() == []
    asked = [url for url in browser.requests() if not url.startswith(("data:", "blob:"))]
    assert asked == [one.as_uri()]
    titles = browser.run("return [...document.querySelectorAll('.chart h3')].map(e => e.innerText)")
    assert titles == ["loss", "lr", "loader wait", "memory", "samples per second"]
    rows = JsonlLog(runs[0] / "metrics.jsonl").read()
    for index, name in enumerate(("train/loss", "val/loss")):
        points = [(row["step"], row[name]) for row in rows if name in row]
        found = chart(browser, "loss", f"[plot.data[{index}].x, plot.data[{index}].y]")
        assert found[0] == [step for step, _ in points]
        assert found[1] == pytest.approx([value for _, value in points], rel=1e-5)
    # A point on the screen for each point of the log, and the lines between them.
    assert chart(browser, "loss", "plot.querySelectorAll('.trace path.js-line').length") == 2
    drawn = "plot.querySelectorAll('.trace .points path.point').length"
    assert chart(browser, "loss", drawn) >= len(rows)
    assert chart(browser, "loss", "plot.querySelector('path.js-line').getBBox().height") > 50


def test_the_axis_is_steps_or_time(browser: Browser, one: Path) -> None:
    browser.open(one)
    draw_all(browser)
    title = "plot.querySelector('.xtitle').textContent"
    assert chart(browser, "loss", title) == "optimizer steps"
    click(browser, "[data-axis=t]")
    browser.until(f"{PLOT.format('loss')}.querySelector('.xtitle').textContent === 'seconds'")
    times = chart(browser, "loss", "plot.data[1].x")
    assert times[0] == pytest.approx(10, abs=1.01)
    assert times[-1] == pytest.approx(38)
    assert chart(browser, "loss", "plot.layout.shapes.filter(s => s.type === 'rect').length") == 2
    click(browser, "[data-axis=x]")
    browser.until(f"{PLOT.format('loss')}.querySelector('.xtitle').textContent !== 'seconds'")


def test_values_are_linear_or_logarithmic(browser: Browser, one: Path) -> None:
    browser.open(one)
    draw_all(browser)
    kinds = "return [...document.querySelectorAll('.plot')].map(p => p._fullLayout.yaxis.type)"
    assert set(browser.run(kinds)) == {"linear"}
    chart(browser, "lr", "chart.querySelector('.own').click()")
    assert browser.run(kinds) == ["linear", "log", "linear", "linear", "linear"]
    click(browser, "#log")
    assert set(browser.run(kinds)) == {"log"}
    assert browser.run("return document.querySelectorAll('.own[aria-pressed=true]').length") == 5


def test_smoothing_draws_a_mean_over_the_faded_values(browser: Browser, one: Path) -> None:
    browser.open(one)
    draw_all(browser)
    values = chart(browser, "loss", "plot.data[0].y")
    slide(browser, "#smooth", 0.8)
    faded, smooth = chart(browser, "loss", "[plot.data[0], plot.data[1]]")
    assert faded["y"] == values
    assert faded["opacity"] < 0.5
    mean = norm = 0.0
    for value, found in zip(values, smooth["y"], strict=True):
        mean, norm = 0.8 * mean + 0.2 * value, 0.8 * norm + 0.2
        assert found == pytest.approx(mean / norm)
    slide(browser, "#smooth", 0)
    assert chart(browser, "loss", "plot.data[0].opacity") == 1


def test_restarts_and_checkpoints_are_marked_until_they_are_hidden(
    browser: Browser, one: Path
) -> None:
    browser.open(one)
    draw_all(browser)
    texts = "plot.data.flatMap(trace => trace.text || [])"
    marks = chart(browser, "loss", texts)
    assert "start 2, from step-00000006" in marks
    assert any(text.startswith("step-00000012") for text in marks)
    assert any(text.startswith("best val/loss") for text in marks)
    assert chart(browser, "loss", "plot.layout.shapes.length") == 1
    click(browser, "#marks")
    assert chart(browser, "loss", texts) == []
    assert chart(browser, "loss", "plot.layout.shapes.length") == 0


def test_dragging_zooms_and_hovering_tells(browser: Browser, one: Path) -> None:
    browser.open(one)
    draw_all(browser)
    area = browser.driver.find_element(By.CSS_SELECTOR, ".plot .nsewdrag")
    before = chart(browser, "loss", "plot._fullLayout.xaxis.range")
    ActionChains(browser.driver).move_to_element(area).perform()
    browser.until("document.querySelector('.plot .hoverlayer').textContent.includes('train')")
    drag = ActionChains(browser.driver).move_to_element_with_offset(area, -60, 0)
    drag.click_and_hold().move_by_offset(120, 0).release().perform()
    browser.until(
        f"{PLOT.format('loss')}.querySelector('.plot')._fullLayout.xaxis.range[1] < {before[1]}"
    )
    after = chart(browser, "loss", "plot._fullLayout.xaxis.range")
    assert before[0] < after[0] < after[1] < before[1]


def test_a_curve_and_an_option_can_be_found(browser: Browser, one: Path) -> None:
    browser.open(one)
    slide(browser, "#find", "VAL/")
    shown = "return [...document.querySelectorAll('.chart')].filter(c => c.offsetParent).length"
    assert browser.run(shown) == 1
    slide(browser, "#search", "keep_last")
    options = (
        "return [...document.querySelectorAll('.option')].filter(o => o.offsetParent)"
        ".map(o => o.innerText.split('\\n')[0])"
    )
    assert browser.run(options) == ["keep_last"]
    slide(browser, "#search", "")
    assert len(browser.run(options)) > 30


def test_light_and_dark_follow_the_system_until_somebody_chooses(
    browser: Browser, one: Path
) -> None:
    colors = "return getComputedStyle(document.body).backgroundColor"
    browser.open(one)
    light = browser.run(colors)
    browser.open(one, dark=True)
    dark = browser.run(colors)
    assert sum(map(int, dark[4:-1].split(","))) < 200 < 600 < sum(map(int, light[4:-1].split(",")))
    draw_all(browser)
    ink = chart(browser, "loss", "plot.layout.font.color")
    click(browser, "#theme")
    assert browser.run(colors) == light
    assert chart(browser, "loss", "plot.layout.font.color") != ink


def test_runs_are_overlaid_and_each_can_be_hidden(browser: Browser, three: Path) -> None:
    browser.open(three)
    draw_all(browser)
    assert browser.complaints() == []
    names = "plot.data.filter(t => t.x.length > 1).map(t => t.name)"
    wanted = [f"{run} {part}" for part in ("train", "val") for run in ("tiny", "second", "third")]
    assert sorted(chart(browser, "loss", names)) == sorted(wanted)
    inks = "new Set(plot.data.filter(t => t.x.length > 1).map(t => t.line.color)).size"
    assert chart(browser, "loss", inks) == 3
    click(browser, "#legend button:nth-child(2)")
    assert sorted(chart(browser, "loss", names)) == sorted(
        name for name in wanted if not name.startswith("second")
    )
    # The third has no timeline: over time there is nothing of it.
    click(browser, "[data-axis=t]")
    assert chart(browser, "loss", names) == ["tiny train", "tiny val"]


@pytest.mark.parametrize("dark", [False, True])
def test_a_phone_shows_it_without_scrolling_sideways(
    browser: Browser, one: Path, three: Path, dark: bool
) -> None:
    for page in (one, three):
        browser.open(page, width=380, height=760, dark=dark)
        draw_all(browser)
        assert browser.run("return document.documentElement.scrollWidth") == 380
        assert chart(browser, "loss", "plot.getBoundingClientRect().width") > 300
        assert browser.complaints() == []


def test_a_chart_becomes_a_picture_without_a_server(browser: Browser, one: Path) -> None:
    browser.open(one)
    draw_all(browser)
    found = browser.driver.execute_async_script(
        "const [done] = arguments; Plotly.toImage(document.querySelector('.plot'),"
        "{format: 'png', width: 600, height: 400}).then(done, error => done(String(error)));"
    )
    head, _, picture = found.partition(",")
    assert head == "data:image/png;base64"
    assert len(base64.b64decode(picture)) > 5_000
    assert browser.complaints() == []


def test_it_prints_all_curves_black_on_white(browser: Browser, one: Path) -> None:
    browser.open(one, dark=True)
    theme = "document.documentElement.dataset.theme"
    assert browser.run(f"return {theme}") == "dark"
    seen = f"addEventListener('beforeprint', () => {{ window.printed = {theme}; }})"
    browser.run(seen)
    printed = browser.driver.execute_cdp_cmd("Page.printToPDF", {"printBackground": False})
    assert base64.b64decode(printed["data"]).startswith(b"%PDF")
    assert browser.run("return window.printed") == "light"
    assert browser.run(f"return {theme}") == "dark"
    undrawn = "return [...document.querySelectorAll('.plot')].filter(p => !p.innerHTML).length"
    assert browser.run(undrawn) == 0


def test_long_curves_are_drawn_in_a_moment(browser: Browser, tmp_path: Path) -> None:
    run = tmp_path / "long"
    run.mkdir()
    with (run / "metrics.jsonl").open("w") as log:
        for step in range(1, 50_001):
            value = 9.0 if step == 31_234 else 1 / step
            log.write(f'{{"step": {step}, "epoch": 0, "train/loss": {value}}}\n')
    write_page(view_directories([run], MOST_POINTS), tmp_path / "long.html")
    browser.open(tmp_path / "long.html")
    draw_all(browser)
    count, x, y = chart(
        browser,
        "loss",
        "[plot.data[0].x.length, plot.data[0].x[plot.data[0].y.indexOf(9)], plot.data[0].y[0]]",
    )
    assert count <= MOST_POINTS + 2
    assert (x, y) == (31_234, 1)
    assert "50,000 values are thinned" in browser.run("return document.body.innerText")
