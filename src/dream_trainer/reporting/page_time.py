"""Where the wall time of runs went, on a report page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from dream_trainer.reporting.goodput import PARTS, Attempt, Goodput
from dream_trainer.reporting.page_html import clock, run_dot, table
from dream_trainer.reporting.run_view import RunView
from dream_trainer.words import duration, percent

#: More moments on a strip than this are a grey wall.
_MOST_TICKS = 2000


def time_section(views: Sequence[RunView]) -> str:
    """Where the wall time went: a bar and a strip for each run, and tables."""
    timed = [(i, view, view.report.goodput) for i, view in enumerate(views) if view.report.goodput]
    if not timed:
        return (
            '<section id="time"><h2>Time</h2><p class="quiet">No timeline.jsonl: nothing tells '
            "when steps were done.</p></section>\n"
        )
    blocks = []
    for index, view, goodput in timed:
        assert goodput is not None
        name = f"{run_dot(index)}{escape(view.label)}: " if len(views) > 1 else ""
        blocks.append(
            f"<h3>{name}{percent(goodput.share)} of {duration(goodput.wall)} became steps that "
            f"count</h3>{_bar(goodput)}{_strip(goodput)}"
        )
    known = [(view.label, view.report.goodput) for _, view, _ in timed if view.report.goodput]
    attempts = "".join(_attempts(label, one, len(views) > 1) for label, one in known)
    return (
        f'<section id="time"><h2>Where the time went</h2>{"".join(blocks)}'
        f"{_part_table(known)}<h3>Starts</h3>{attempts}</section>\n"
    )


def _bar(goodput: Goodput) -> str:
    pieces = "".join(
        f'<span class="part {name}" style="flex-grow:{seconds:.6g}" '
        f'title="{_part_name(name)}: {duration(seconds)}, {percent(seconds / goodput.wall)}">'
        f"{_part_name(name) if seconds > 0.12 * goodput.wall else ''}</span>"
        for name, seconds in goodput.parts.items()
        if seconds > 0
    )
    return f'<div class="bar" role="img" aria-label="parts of the wall time">{pieces}</div>'


def _strip(goodput: Goodput) -> str:
    """Attempts one after another, on the clock."""
    begin = goodput.attempts[0].began
    span = goodput.attempts[-1].ended - begin or 1.0

    def piece(kind: str, start: float, end: float, text: str) -> str:
        left, width = 100 * (start - begin) / span, 100 * (end - start) / span
        style = f"left:{left:.4f}%;width:{width:.4f}%"
        return f'<span class="part {kind}" style="{style}" title="{escape(text)}"></span>'

    pieces = []
    for number, one in enumerate(goodput.attempts, start=1):
        kept = f"start {number}: steps {one.first_step:,} to {one.counted_step:,}"
        lost = f"start {number}: {one.lost_steps:,} steps lost"
        pieces += [
            piece("start_up", one.began, one.started, f"start {number}: start-up"),
            piece("training", one.started, one.counted_until, kept),
            piece("lost", one.counted_until, one.ended, lost),
        ]
        saves = [m for m in one.moments if m.event == "checkpoint"]
        if sum(len(a.moments) for a in goodput.attempts) < _MOST_TICKS:
            pieces += [
                piece("tick", m.time, m.time, str(m.fields.get("name", "save"))) for m in saves
            ]
    return (
        '<div class="strip" role="img" aria-label="starts of the run over time">'
        f'{"".join(pieces)}</div><div class="ends"><span>{clock(begin)}</span>'
        f'<span class="quiet">starts over time; a tick is a checkpoint</span>'
        f"<span>{clock(goodput.attempts[-1].ended)}</span></div>"
    )


def _part_table(known: Sequence[tuple[str, Goodput]]) -> str:
    heads = ["Part", *(escape(label) if len(known) > 1 else "Time" for label, _ in known), ""]
    rows = [
        [
            f'<i class="part {name}"></i>{_part_name(name)}',
            *(_part(one, name) for _, one in known),
            of,
        ]
        for name, of in PARTS.items()
    ]
    rows.append(["wall time", *(f"<b>{duration(one.wall)}</b>" for _, one in known), ""])
    classes = dict.fromkeys(range(1, len(heads) - 1), "number") | {len(heads) - 1: "meaning"}
    return table(heads, rows, classes)


def _part(goodput: Goodput, name: str) -> str:
    seconds = goodput.parts[name]
    share = seconds / goodput.wall if goodput.wall else 0.0
    return f"{duration(seconds)} <small>{percent(share)}</small>"


def _attempts(label: str, goodput: Goodput, with_label: bool) -> str:
    heads = ["", "Began (UTC)", "From", "Steps", "Lost", "Ran for", "Ended", "On"]
    rows = [_attempt(number, one) for number, one in enumerate(goodput.attempts, start=1)]
    name = f"<h4>{escape(label)}</h4>" if with_label else ""
    return name + table(heads, rows, {4: "number", 5: "number"})


def _attempt(number: int, one: Attempt) -> list[str]:
    told = one.moments[0].fields
    ranks = told.get("ranks")
    place = [told.get("host"), told.get("device"), told.get("strategy")]
    where = [str(part) for part in place if part]
    if isinstance(ranks, int) and ranks > 1:
        where.insert(0, f"{ranks} ranks")
    ended = one.status or "no end: killed, or going on"
    return [
        str(number),
        clock(one.began),
        escape(one.resumed_from or "the beginning"),
        f"{one.first_step:,} to {one.last_step:,}",
        f"{one.lost_steps:,}" if one.lost_steps else "",
        duration(one.ended - one.began),
        escape(ended + (f": {one.reason}" if one.reason else "")),
        escape(", ".join(where)),
    ]


def _part_name(name: str) -> str:
    return name.replace("_", "-")
