"""The top of a report page: what each run came to, and what is wrong."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from dream_trainer.reporting.page_html import clock, moment, run_dot, told
from dream_trainer.reporting.run_report import RunReport
from dream_trainer.reporting.run_view import RunView
from dream_trainer.words import duration, percent


def cards(views: Sequence[RunView]) -> str:
    """What each run came to, in a few numbers."""
    found = "".join(_card(view, _name(i, view, len(views))) for i, view in enumerate(views))
    return f'<section class="cards">{found}</section>\n'


def _name(index: int, view: RunView, count: int) -> str:
    if count == 1:
        return ""  # it is the title of the page
    return f"<h2>{run_dot(index)}{escape(view.label)}</h2>"


def _card(view: RunView, name: str) -> str:
    report = view.report
    facts = [("steps", f"{report.step:,}"), ("epochs", f"{report.epoch:,}")]
    monitored = report.metrics.get(report.monitor or "")
    if monitored is not None and (best := monitored.best(str(report.mode))):
        facts.append(
            (f"best {report.monitor}", f"{best[0]:.5g} <small>at step {best[1]:,}</small>")
        )
    if (goodput := report.goodput) is not None:
        facts += [
            ("wall time", duration(goodput.wall)),
            ("goodput", percent(goodput.share)),
            ("restarts", str(goodput.restarts)),
            ("steps done again", f"{goodput.lost_steps:,}"),
        ]
    told = "".join(f"<div><dt>{escape(name)}</dt><dd>{text}</dd></div>" for name, text in facts)
    return f"<article>{name}<p>{escape(_ended(report))}</p><dl>{told}</dl></article>"


def _ended(report: RunReport) -> str:
    where = str(report.directory)
    if report.goodput is None:
        return f"{where}, last written {moment(report.last_written)}"
    last = report.goodput.attempts[-1]
    moment_of_end = f"{clock(last.ended)} UTC"
    if last.status is None:
        return f"{where}, no end: goes on, or was killed; last heard of at {moment_of_end}"
    reason = f" ({last.reason})" if last.reason else ""
    return f"{where}, {last.status} at {moment_of_end}{reason}"


def problem_section(views: Sequence[RunView]) -> str:
    """What could not be read, and what is odd."""
    rows = [(view.label, problem) for view in views for problem in _problems(view)]
    if not rows:
        return ""
    items = "".join(f"<li><b>{escape(label)}</b> {escape(text)}</li>" for label, text in rows)
    return f'<section id="problems"><h2>Problems</h2><ul>{items}</ul></section>\n'


def _problems(view: RunView) -> Iterable[str]:
    report = view.report
    yield from (f"not read: {one}" for one in report.problems)
    for name, curve in view.logged.items():
        if curve.num_not_finite:
            yield f"{name}: {curve.num_not_finite:,} of {curve.num_values:,} values are not finite"
    for change in report.config_changes:
        values = [f"{name} {told(a)} → {told(b)}" for name, (a, b) in change.values.items()]
        yield f"started again with another configuration: {', '.join(values) or 'its text'}"
    for name in report.logs_set_aside:
        yield f"log begun anew; the earlier one is {name}"
    for one in report.checkpoints:
        yield from (f"{one.path.name}: {problem}" for problem in one.problems)
