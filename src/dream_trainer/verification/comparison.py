"""Runs against the straight one: the first moment at which they differ, and what differs there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import zip_longest

from dream_trainer.loggers import LOG_NAME
from dream_trainer.verification.diagnosis import Evidence
from dream_trainer.verification.observer import Leaves, Observation, Place
from dream_trainer.verification.report import Difference
from dream_trainer.verification.runs import Run

#: What comes first in a step is named first: the rest follows from it.
_ORDER = ("rng", "models", "optimizers", "schedulers", "precision", "trainer", "dataloaders")
_MISSING = "not there"


@dataclass(frozen=True)
class Fault:
    """How a run differs from the straight one."""

    difference: Difference
    evidence: Evidence
    also: tuple[str, ...] = ()
    traceback: str | None = None

    @property
    def urgency(self) -> tuple[int, bool]:
        """The smallest one of several faults is the one to tell."""
        return self.difference.step, not self.difference.in_state


@dataclass
class Comparison:
    """Compares runs with a straight one.

    Args:
        straight: a whole run.
        ignore: patterns of paths that may differ.
    """

    straight: Run
    ignore: Sequence[str] = ()
    noise: set[str] = field(default_factory=set)
    """Attributes in which two straight runs differ."""

    @property
    def paths(self) -> set[str]:
        """All that is compared."""
        return {
            path
            for one in self.straight.observations[1:]
            for section in (one.batches, one.state, one.attributes)
            for path in section
            if not self._is_ignored(path) and not (section is one.attributes and path in self.noise)
        }

    @property
    def unused_patterns(self) -> list[str]:
        """Those of ``ignore`` that no path fits."""
        paths = {p for o in self.straight.observations for s in _sections(o) for p in s}
        paths |= {f"{LOG_NAME}.{name}" for row in self.straight.log for name in row}
        return [one for one in self.ignore if not any(fnmatchcase(path, one) for path in paths)]

    def learn_noise(self, again: Run) -> None:
        """Note the attributes in which another straight run differs; they tell nothing."""
        for one, other in zip(self.straight.observations, again.observations, strict=False):
            self.noise |= set(_differing(one.attributes, other.attributes))

    def with_straight(self, again: Run, until: Place | None = None) -> Fault | None:
        """Compare with another run that nobody interrupted, or not yet."""
        expected = self.straight.observations
        if until is not None:
            expected = expected[: self._index(until) + 1]
        start = expected[0], again.observations[0]
        if fault := self._at(*start, is_resumed=False, is_start=True):
            return fault
        fault = self._along(expected[1:], again, is_resumed=False)
        return fault if until is not None else _earlier(fault, self._of_log(again, False))

    def with_resumed(
        self, resumed: Run, killed_at: Place, killed: Run, *, with_attributes: bool = True
    ) -> Fault | None:
        """Compare with a run that was killed at a place, and resumed."""
        index = self._index(killed_at)
        before = self.straight.observations[index]
        if not resumed.observations:
            return _failure(resumed, killed_at)
        start = resumed.observations[0]
        if start.place != killed_at:
            return _other_start(start, killed.observations[0], killed_at)
        lost = set(_differing(before.attributes, start.attributes)) if with_attributes else None
        fault = self._along(
            self.straight.observations[index + 1 :], resumed, is_resumed=True, lost=lost
        )
        if fault is None and resumed.failure is not None:
            return _failure(resumed, killed_at)
        return fault if resumed.failure else _earlier(fault, self._of_log(resumed, True))

    def _along(
        self,
        expected: Sequence[Observation],
        run: Run,
        *,
        is_resumed: bool,
        lost: set[str] | None = None,
    ) -> Fault | None:
        for one, other in zip_longest(expected, run.observations[1:]):
            if other is None and run.failure is not None:
                return None
            if one is None or other is None or one.place != other.place:
                return _other_course(one, other, is_resumed)
            if fault := self._at(one, other, is_resumed=is_resumed, lost=lost):
                return fault
        return None

    def _at(
        self,
        one: Observation,
        other: Observation,
        *,
        is_resumed: bool,
        is_start: bool = False,
        lost: set[str] | None = None,
    ) -> Fault | None:
        """What differs at a place. Attributes count if ``lost`` says which were not restored."""
        batches = self._kept(_differing(one.batches, other.batches))
        state = sorted(self._kept(_differing(one.state, other.state)), key=_rank)
        attributes: list[str] = []
        if lost is not None:
            differing = _differing(one.attributes, other.attributes)
            attributes = self._kept(path for path in differing if path not in self.noise)
        found = [*batches, *state, *attributes]
        if not found:
            return None
        in_state = bool(batches or state)
        before, after = _sections(one), _sections(other)
        number = 0 if batches else 1 if state else 2
        path = found[0]
        return Fault(
            Difference(
                path=path,
                step=one.place.step,
                place="the start" if is_start else str(one.place),
                straight=_text(before[number], path, after[number]),
                other=_text(after[number], path, before[number]),
                in_state=in_state,
            ),
            Evidence(
                is_resumed=is_resumed,
                is_start=is_start,
                batches=tuple(batches),
                data=tuple(_differing(one.data, other.data)),
                state=tuple(state),
                attributes=tuple(path for path in attributes if path in (lost or ())),
                stateful_callbacks=_stateful_callbacks(one),
            ),
            also=tuple(found[1:]),
        )

    def _of_log(self, run: Run, is_resumed: bool) -> Fault | None:
        for number, (row, other) in enumerate(zip_longest(self.straight.log, run.log), start=1):
            row, other = row or {}, other or {}
            names = [
                name
                for name in dict.fromkeys((*row, *other))
                if row.get(name) != other.get(name) and not self._is_ignored(f"{LOG_NAME}.{name}")
            ]
            if names:
                step = int((row or other).get("step", "0"))
                return Fault(
                    Difference(
                        path=f"{LOG_NAME}.{names[0]}",
                        step=step,
                        place=f"line {number} of {LOG_NAME} (step {step})",
                        straight=row.get(names[0], _MISSING),
                        other=other.get(names[0], _MISSING),
                    ),
                    Evidence(is_resumed, log=tuple(f"{LOG_NAME}.{name}" for name in names)),
                    also=tuple(f"{LOG_NAME}.{name}" for name in names[1:]),
                )
        return None

    def _index(self, place: Place) -> int:
        # The first is the start, whose place can be that of a checkpoint.
        places = [one.place for one in self.straight.observations[1:]]
        return places.index(place) + 1

    def _kept(self, paths: Iterable[str]) -> list[str]:
        return [path for path in paths if not self._is_ignored(path)]

    def _is_ignored(self, path: str) -> bool:
        return any(fnmatchcase(path, pattern) for pattern in self.ignore)


def _sections(one: Observation) -> tuple[Leaves, Leaves, Leaves]:
    return one.batches, one.state, one.attributes


def _differing(one: Leaves, other: Leaves) -> list[str]:
    return [
        path
        for path in dict.fromkeys((*one, *other))
        if path not in one or path not in other or one[path].digest != other[path].digest
    ]


def _rank(path: str) -> int:
    part = path.partition(".")[0]
    return _ORDER.index(part) if part in _ORDER else len(_ORDER)


def _text(leaves: Leaves, path: str, others: Leaves) -> str:
    if path not in leaves:
        return _MISSING
    found = leaves[path]
    if path in others and others[path].text == found.text:
        return f"{found.text}, sha256 {found.digest[:12]}"
    return found.text


def _stateful_callbacks(one: Observation) -> frozenset[str]:
    """Names of callbacks in the state; that of a callback may have dots."""
    paths = [path.split(".", 1)[1] for path in one.state if path.startswith("callbacks.")]
    return frozenset(
        ".".join(parts[:end])
        for parts in (path.split(".") for path in paths)
        for end in range(1, len(parts) + 1)
    )


def _earlier(one: Fault | None, other: Fault | None) -> Fault | None:
    return min((f for f in (one, other) if f is not None), key=lambda f: f.urgency, default=None)


def _failure(run: Run, killed_at: Place) -> Fault:
    assert run.failure is not None
    place = run.observations[-1].place if run.observations else killed_at
    return Fault(
        Difference("fit()", place.step, str(place), "goes on", run.failure.text),
        Evidence(is_resumed=True, failure=run.failure.text),
        traceback=run.failure.traceback,
    )


def _other_start(start: Observation, killed: Observation, killed_at: Place) -> Fault:
    found = f"{start.run_directory}, and the killed run is in {killed.run_directory}"
    return Fault(
        Difference("fit()", killed_at.step, str(killed_at), "goes on", f"starts at {start.place}"),
        Evidence(is_resumed=True, elsewhere=found),
    )


def _other_course(one: Observation | None, other: Observation | None, is_resumed: bool) -> Fault:
    place = next(each.place for each in (one, other) if each is not None)
    texts = [_MISSING if each is None else f"is at {each.place}" for each in (one, other)]
    return Fault(
        Difference("fit()", place.step, str(place), texts[0], texts[1]),
        Evidence(is_resumed, course=True),
    )
