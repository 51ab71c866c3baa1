"""What is drawn of a run: every metric over steps and, with a timeline, over time."""

from __future__ import annotations

import itertools
import math
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dream_trainer.reporting.goodput import Goodput
from dream_trainer.reporting.timeline import Moment

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

PHASES = ("train", "val", "test")
_PHASE_OF = {"training": "train", "valid": "val", "validation": "val"}
#: Shown first, and last; the others in between, by name.
_FIRST, _LAST = ("loss",), ("lr",)


@dataclass(frozen=True)
class Curve:
    """Points of one quantity of one run."""

    steps: Array
    values: Array
    """NaN where a value was not finite, or where nothing is to be drawn."""
    seconds: Array | None = None
    """Since the run began; None without a timeline."""
    means: tuple[Array, Array, Array | None] | None = None
    """Steps, means and seconds of the buckets of a long curve; None if it is whole."""
    num_values: int = 0
    """How many there were."""
    num_not_finite: int = 0


class CurveCollector:
    """Takes the rows of a log, 16 bytes a value."""

    def __init__(self) -> None:
        self._points: dict[str, tuple[array[float], array[float]]] = {}

    def add(self, name: str, value: float, step: int) -> None:
        """One more value."""
        points = self._points.get(name)
        if points is None:
            points = self._points[name] = (array("d"), array("d"))
        points[0].append(step)
        points[1].append(value)

    def curves(self, most: int | None, goodput: Goodput | None = None) -> dict[str, Curve]:
        """All of them.

        Args:
            most: points that a curve may have; None for all.
            goodput: says when steps were done.
        """
        import numpy as np

        clock = step_clock(goodput)
        found = {}
        for name, points in self._points.items():
            steps, values = (np.array(one) for one in points)
            seconds = None if clock is None else np.interp(steps, *clock)
            found[name] = _curve(steps, values, seconds, most)
        return found


def step_clock(goodput: Goodput | None) -> tuple[Array, Array] | None:
    """Steps that count and the seconds since the run began at which they were done.

    Both grow, so that what lies between can be interpolated. A step at which a run went on
    belongs to the attempt before.
    """
    import numpy as np

    if goodput is None:
        return None
    begin, knots = goodput.attempts[0].began, []
    for number, one in enumerate(goodput.attempts):
        first = one.first_step + (0.001 if number else 0.0)
        if number and one.counted_step <= one.first_step:
            continue
        knots.append((first, one.started - begin))
        knots += [
            (m.step, m.time - begin)
            for m in one.moments
            if one.first_step < m.step <= one.counted_step and m.time <= one.counted_until
        ]
        if one.counted_step > one.first_step:
            knots.append((one.counted_step, one.counted_until - begin))
    # The first moment at which a step is known to be done.
    kept = [next(group) for _, group in itertools.groupby(knots, key=lambda knot: knot[0])]
    steps, seconds = zip(*kept, strict=True)
    return np.array(steps, float), np.array(seconds, float)


def measured_curves(goodput: Goodput | None, most: int | None) -> dict[str, Curve]:
    """What progress lines tell of throughput and memory, broken between two attempts.

    Args:
        goodput: whose attempts have the lines.
        most: points that a curve may have; None for all.
    """
    import numpy as np

    if goodput is None:
        return {}
    begin = goodput.attempts[0].began
    rows: list[tuple[int, float, Mapping[str, Any] | None]] = []
    for number, one in enumerate(goodput.attempts):
        told = _with_measured(one.moments)
        if number and rows and told:
            rows.append((told[0].step, told[0].time - begin, None))
        rows += [(m.step, m.time - begin, m.fields["measured"]) for m in told]
    names = dict.fromkeys(name for _, _, values in rows for name in values or ())
    found: dict[str, Curve] = {}
    for name in names:
        points = [
            (step, seconds, math.nan if values is None else _number(values[name]))
            for step, seconds, values in rows
            if values is None or name in values
        ]
        steps, seconds, values = (np.array(one, float) for one in zip(*points, strict=True))
        found[name] = _curve(steps, values, seconds, most)
    return found


def _with_measured(moments: Sequence[Moment]) -> list[Moment]:
    """Progress lines that tell of batches: a rate over none is no rate."""
    found, done = [], 0
    for moment in moments:
        told = moment.fields.get("measured")
        batches = moment.fields.get("batches", done + 1)
        if isinstance(told, dict) and batches != done:
            found.append(moment)
            done = batches
    return found


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan


def _curve(steps: Array, values: Array, seconds: Array | None, most: int | None) -> Curve:
    import numpy as np

    finite = np.isfinite(values)
    total, bad = len(values), int(len(values) - finite.sum())
    values = np.where(finite, values, np.nan)
    means = None
    if most is not None and total > most:
        edges, kept = buckets(values, most // 2)
        means = (_mean(steps, edges), _mean(values, edges), _mean(seconds, edges))
        steps, values = steps[kept], values[kept]
        seconds = None if seconds is None else seconds[kept]
    return Curve(steps, values, seconds, means, total, bad)


def _mean(values: Array | None, edges: NDArray[np.intp]) -> Any:
    """Means of buckets over what is finite; NaN where nothing is."""
    import numpy as np

    if values is None:
        return None
    finite = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        sums = np.add.reduceat(np.where(finite, values, 0.0), edges)
        return sums / np.add.reduceat(finite.astype(float), edges)


def buckets(values: Array, count: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Divide a curve into equal parts and keep the lowest and the highest point of each.

    The first and the last point stay too. Values that are not finite are NaN and count for
    nothing, unless a bucket has no others.

    Args:
        values: more than there are buckets.
        count: how many.

    Returns:
        Where each bucket begins, and the indices of the points to keep.
    """
    import numpy as np

    edges = np.linspace(0, len(values), count + 1).astype(int)
    sizes, edges = np.diff(edges), edges[:-1]
    finite = np.isfinite(values)
    number = np.repeat(np.arange(count), sizes)
    # Sorted by bucket, then by value: the ends of each bucket are its lowest and highest.
    lowest = np.lexsort((np.where(finite, values, np.inf), number))[edges]
    highest = np.lexsort((np.where(finite, values, -np.inf), number))[edges + sizes - 1]
    return edges, np.unique(np.concatenate([[0], lowest, highest, [len(values) - 1]]))


@dataclass(frozen=True)
class Chart:
    """Quantities that are drawn into one picture."""

    title: str
    lines: Mapping[str, str]
    """Metric -> phase, or what else tells it from the others; in the order of drawing."""


def arrange(names: Iterable[str]) -> list[Chart]:
    """Which metrics share a chart: those of one quantity in several phases, and of one group.

    ``train/loss`` and ``val/loss`` are both ``loss``; ``lr/model`` and ``lr/head`` are ``lr``.
    """
    charts: dict[str, dict[str, str]] = {}
    for name in sorted(names):
        head, slash, rest = name.partition("/")
        phase = _PHASE_OF.get(head, head)
        if slash and phase in PHASES:
            charts.setdefault(rest, {})[name] = phase
        else:
            charts.setdefault(head, {})[name] = rest or head
    return [
        Chart(title, dict(sorted(lines.items(), key=lambda one: _phase_rank(one[1]))))
        for title, lines in sorted(charts.items(), key=_chart_rank)
    ]


def _phase_rank(phase: str) -> tuple[int, str]:
    return (PHASES.index(phase) if phase in PHASES else len(PHASES), phase)


def _chart_rank(chart: tuple[str, Mapping[str, str]]) -> tuple[int, int, str]:
    title, lines = chart
    place = 0 if title in _FIRST else 2 if title in _LAST else 1
    # What is measured in more than one phase is what the run is about.
    return (place, -len(_phases_of(lines)), title)


def _phases_of(lines: Mapping[str, str]) -> set[str]:
    """The phases among the lines of a chart."""
    return set(lines.values()) & set(PHASES)
