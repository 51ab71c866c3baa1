"""Goodput: the share of wall time that became steps which count, and where the rest went."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dream_trainer.reporting.timeline import Moment

#: Name of a part -> what it is. Together they are the wall time.
PARTS = {
    "training": "batches of steps that count",
    "loader": "waiting for batches",
    "validation": "validation",
    "saves": "waiting for checkpoints",
    "start_up": "from the call of fit to the first batch",
    "lost": "steps that a restart did again",
    "down": "from the last sign of life to the next start, unless the run was over",
    "other": "callbacks, logs, and all that nobody measured",
}
_PART_OF = {
    "train": "training",
    "loader": "loader",
    "validation": "validation",
    "save": "saves",
    "other": "other",
}


@dataclass
class Attempt:
    """A process of a run, from its start to the last that is known of it.

    Times are seconds since 1970 on a clock that never goes back, over all attempts.
    """

    began: float
    """When ``fit`` was called."""
    started: float
    """When the first batch came next."""
    ended: float
    """The last sign of life."""
    first_step: int
    """Steps that were done at the start."""
    last_step: int
    moments: list[Moment]
    counted_step: int = 0
    """Steps beyond it were lost: a later attempt did them again."""
    counted_until: float = 0.0
    """When that step was done."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """Seconds by name, without ``down``."""

    @property
    def resumed_from(self) -> str | None:
        """The checkpoint it went on from; None if it began at the beginning."""
        found = self._told("resumed_from")
        return None if found is None else str(found)

    @property
    def status(self) -> str | None:
        """``"done"``, ``"stopped"``, ``"interrupted"`` or ``"failed"``; None without an end."""
        last = self.moments[-1]
        return str(last.fields.get("status")) if last.event == "end" else None

    @property
    def is_at_end(self) -> bool:
        """Whether the run was over: it had reached its length, or was stopped by its program."""
        return self.status in ("done", "stopped")

    @property
    def reason(self) -> str | None:
        """Why it ended, in words."""
        last = self.moments[-1]
        told = last.fields.get("reason") if last.event == "end" else None
        return None if told is None else str(told)

    @property
    def lost_steps(self) -> int:
        """Steps that were done again later."""
        return self.last_step - self.counted_step

    def _told(self, name: str) -> Any:
        return self.moments[0].fields.get(name)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for programs."""
        told = ("ranks", "host", "strategy", "device", "resumed_from")
        return {
            "began": self.began,
            "started": self.started,
            "ended": self.ended,
            "first_step": self.first_step,
            "last_step": self.last_step,
            "counted_step": self.counted_step,
            "lost_steps": self.lost_steps,
            "status": self.status,
            "reason": self.reason,
            "seconds": {name: round(value, 3) for name, value in self.parts.items()},
        } | {name: self._told(name) for name in told}


@dataclass(frozen=True)
class Goodput:
    """Where the wall time of a run went."""

    parts: Mapping[str, float]
    """Seconds by the names of `PARTS`; their sum is `wall`."""
    attempts: Sequence[Attempt]

    @property
    def wall(self) -> float:
        """Seconds from the first start to the last line, without `idle`."""
        return self.attempts[-1].ended - self.attempts[0].began - self.idle

    @property
    def idle(self) -> float:
        """Seconds in which the run had come to its end, and was not started again yet."""
        pairs = itertools.pairwise(self.attempts)
        return sum(after.began - before.ended for before, after in pairs if before.is_at_end)

    @property
    def share(self) -> float:
        """Of the wall time, what became steps that count; 0 if no time has passed."""
        return self.parts["training"] / self.wall if self.wall else 0.0

    @property
    def restarts(self) -> int:
        """Attempts after the first."""
        return len(self.attempts) - 1

    @property
    def lost_steps(self) -> int:
        """Steps that were done more than once, once for each time that did not count."""
        return sum(one.lost_steps for one in self.attempts)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for programs."""
        return {
            "share": round(self.share, 6),
            "wall_seconds": round(self.wall, 3),
            "seconds": {name: round(value, 3) for name, value in self.parts.items()},
            "restarts": self.restarts,
            "lost_steps": self.lost_steps,
            "attempts": [one.as_dict() for one in self.attempts],
        }


def measure_goodput(moments: Sequence[Moment]) -> Goodput | None:
    """Account for every second between the first start and the last line.

    A run that was over, and is started again later, was not down in between: that time is left out.

    Steps of an attempt count up to the lowest step that a later attempt started at. Between two
    lines seconds are divided in proportion. After the last progress line of an attempt they are
    training where steps were done, less the saves and validations whose length is told.

    Args:
        moments: lines in the order of the file. A clock that goes back stands still instead.

    Returns:
        None if there are no lines.
    """
    if not moments:
        return None
    attempts = _attempts(moments)
    parts = dict.fromkeys(PARTS, 0.0)
    redone_from: int | None = None
    for one in reversed(attempts):
        one.counted_step = one.last_step
        if redone_from is not None:
            one.counted_step = min(one.last_step, max(redone_from, one.first_step))
        one.counted_until = _moment_of_step(one, redone_from)
        redone_from = one.first_step if redone_from is None else min(redone_from, one.first_step)
        one.parts = _parts(one)
        for name, seconds in one.parts.items():
            parts[name] += seconds
    for before, after in itertools.pairwise(attempts):
        if not before.is_at_end:
            parts["down"] += after.began - before.ended
    return Goodput(parts, attempts)


def _attempts(moments: Sequence[Moment]) -> list[Attempt]:
    found: list[Attempt] = []
    now = float("-inf")
    for moment in moments:
        if moment.event == "start" or not found:
            told = moment.fields.get("began")
            began = max(now, min(float(told), moment.time) if told is not None else moment.time)
            now = max(began, moment.time)
            found.append(Attempt(began, now, now, moment.step, moment.step, []))
        now = max(now, moment.time)
        one = found[-1]
        one.ended, one.last_step = now, max(one.last_step, moment.step)
        one.moments.append(Moment(now, moment.event, moment.step, moment.fields))
    return found


def _moment_of_step(one: Attempt, redone_from: int | None) -> float:
    """When the last step that counts was done, its checkpoint included."""
    if redone_from is None or redone_from > one.last_step:
        return one.ended
    if redone_from < one.first_step:
        return one.started
    saved = [m for m in one.moments if m.step == redone_from and m.event == "checkpoint"]
    if saved:
        return saved[-1].time
    before = [m for m in one.moments if m.step <= redone_from][-1]
    after = next((m for m in one.moments if m.step > redone_from), None)
    if after is None or before.step == redone_from:
        return before.time if before.step == redone_from else one.ended
    done = (redone_from - before.step) / (after.step - before.step)
    return before.time + done * (after.time - before.time)


def _parts(one: Attempt) -> dict[str, float]:
    parts = dict.fromkeys((name for name in PARTS if name != "down"), 0.0)
    parts["start_up"] = one.started - one.began
    for began, ended, seconds in _stretches(one):
        counted = min(max(one.counted_until - began, 0.0), ended - began)
        share = counted / (ended - began)
        for name, value in seconds.items():
            parts[name] += value * share
        parts["lost"] += ended - began - counted
    return parts


def _stretches(one: Attempt) -> Iterator[tuple[float, float, dict[str, float]]]:
    """Begin, end and seconds by part of the time between progress lines, without empty ones."""
    at, known = 0, dict.fromkeys(_PART_OF, 0.0)
    last = len(one.moments) - 1
    for index, moment in enumerate(one.moments):
        is_progress = moment.event == "progress"
        if not is_progress and index != last:
            continue
        began, ended = one.moments[at].time, moment.time
        seconds = dict.fromkeys(_PART_OF.values(), 0.0)
        if is_progress:
            told = moment.fields["seconds"]
            for name, part in _PART_OF.items():
                value = float(told.get(name, 0.0))
                seconds[part] = max(value - known[name], 0.0)
                known[name] = value
        else:
            between = one.moments[at + 1 : index + 1]
            seconds |= _estimated(between, ended - began, moment.step > one.moments[at].step)
        at = index
        if ended > began:
            yield began, ended, _filled(seconds, ended - began)


def _estimated(moments: Sequence[Moment], length: float, has_steps: bool) -> dict[str, float]:
    """What happened where no progress line says so."""
    saves = sum(float(m.fields.get("stall") or 0.0) for m in moments if m.event == "checkpoint")
    took = sum(float(m.fields.get("took") or 0.0) for m in moments if m.event == "validation")
    rest = max(length - saves - took, 0.0)
    return {"saves": saves, "validation": took, "training": rest if has_steps else 0.0}


def _filled(seconds: dict[str, float], length: float) -> dict[str, float]:
    """Seconds that are ``length`` together: nobody measures everything, and clocks differ."""
    total = sum(seconds.values())
    if total > length:
        return {name: value * length / total for name, value in seconds.items()}
    return seconds | {"other": seconds["other"] + length - total}
