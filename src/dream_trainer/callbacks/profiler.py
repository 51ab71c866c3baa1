"""Profiler: traces of chosen steps, by torch's own profiler."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from itertools import count, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from torch.profiler import ProfilerAction, ProfilerActivity, profile

from dream_trainer.callbacks.callback import Callback
from dream_trainer.errors import ConfigError
from dream_trainer.storage import atomic_file, write_text

if TYPE_CHECKING:
    from dream_trainer.trainer.base import BaseTrainer

_START = re.compile(r"-start-(\d+)-rank-")


class Profiler(Callback):
    """Writes what runs in some steps of a run into files for Perfetto, one a rank.

    Steps are optimizer steps of the run, counted from 0, restarts included: what was profiled
    before a restart is not profiled again, unless the steps themselves are done again. ``wait``
    steps are passed over, ``warmup`` steps recorded and thrown away, ``active`` steps kept, and
    all of it is done ``repeat`` times. With ``at_steps`` the ``active`` steps from each of these on
    are kept instead. A step is all from the end of the one before it: the wait for its batches, and
    the validation and the save that the step before it has caused.

    The files are ``profile/step-00000012-rank-0.pt.trace.json.gz`` in the run directory, named for
    the first step that is kept, with the operations that took longest beside it as text. Nothing is
    overwritten: a restarted program writes ``step-00000012-start-2-rank-0`` and so on. The profiler
    changes no numbers. In the steps that are recorded it takes time, and the files are written
    before the run goes on.

    Args:
        wait: steps to pass over, each time.
        warmup: steps recorded and thrown away: the first ones are slower.
        active: steps to keep.
        repeat: how often; 0 is until the run ends.
        at_steps: keep the ``active`` steps from each of these on.
        record_shapes: also the shapes of what operations are given.
        profile_memory: also what is allocated and freed.
        with_stack: also the lines of Python. Slow.
        compress: write ``.json.gz``, a tenth as large.
        ranks: those that write; None is all of them.
        folder: where the files go, instead of ``profile`` in the run directory. A run that writes
            no directory is profiled only with a folder.
        num_rows: operations in the table.

    Attributes:
        traces: the files that this rank has written since the run began.
        operations: the last table.

    Raises:
        ConfigError: a number that cannot work.
    """

    def __init__(
        self,
        *,
        wait: int = 10,
        warmup: int = 2,
        active: int = 3,
        repeat: int = 1,
        at_steps: Sequence[int] | None = None,
        record_shapes: bool = False,
        profile_memory: bool = False,
        with_stack: bool = False,
        compress: bool = True,
        ranks: Sequence[int] | None = None,
        folder: str | Path | None = None,
        num_rows: int = 20,
    ) -> None:
        given = {"wait": wait, "warmup": warmup, "repeat": repeat}
        problems = [f"{name} is {n}, and must not be below 0" for name, n in given.items() if n < 0]
        problems += [f"active is {active}, and must be above 0"] if active < 1 else []
        steps = sorted(set(at_steps or ()))
        problems += [f"at_steps has {step}; the first step is 0" for step in steps if step < 0]
        problems += [
            f"at_steps has {one} and {other}, with active={active} steps from each"
            for one, other in pairwise(steps)
            if other - one < active
        ]
        if problems:
            raise ConfigError("Profiler", problems)
        self.wait, self.warmup, self.active, self.repeat = wait, warmup, active, repeat
        self.at_steps = None if at_steps is None else steps
        self.record_shapes, self.profile_memory = record_shapes, profile_memory
        self.with_stack, self.compress = with_stack, compress
        self.ranks, self.folder, self.num_rows = ranks, folder, num_rows
        self.traces: list[Path] = []
        self.operations = ""
        self._profile: profile | None = None
        self._first_steps: Iterator[int] = iter(())
        self._first = self._begin = self._last_step = -1
        self._start, self._into = 1, Path()

    def pre_fit(self, trainer: BaseTrainer) -> None:
        """Look where to write; a broadcast. Begin, if the first step is to be recorded."""
        self.traces = []
        self._first = self._begin = -1
        folder = self.folder
        if folder is None and trainer.writes_run_directory:
            folder = trainer.run_directory / "profile"
        if folder is None:
            return
        self._into = Path(folder)
        # On rank 0: others may see the file of a faster rank, and count one start more.
        world = trainer.world
        self._start = world.broadcast(_next_start(self._into) if world.is_global_zero else 0)
        if self.ranks is not None and world.rank not in self.ranks:
            return
        self._last_step = trainer.global_step
        self._first_steps = self._wanted()
        self._choose_next(trainer.global_step)
        self._begin_if_due(trainer)

    def on_boundary(self, trainer: BaseTrainer) -> None:
        """Begin, go on or end, between two steps."""
        step = trainer.global_step
        if self._first < 0 or step == self._last_step:
            return
        self._last_step = step
        if self._profile is None:
            self._begin_if_due(trainer)
        elif step >= self._first + self.active:
            recording, self._profile = self._profile, None
            # A batch that takes several steps may have passed over all that was to be kept.
            is_empty = recording.current_action is ProfilerAction.WARMUP
            recording.stop()
            if not is_empty:
                try:
                    self._write(recording, trainer)
                except OSError as error:  # a full disk must not end the run
                    text = f"the profile of step {self._first} cannot be written: {error}"
                    warnings.warn(text, RuntimeWarning, stacklevel=2)
            self._choose_next(step)
            self._begin_if_due(trainer)
        else:
            self._profile.step()

    def close(self, trainer: BaseTrainer) -> None:
        """End a recording that the run's end has cut short; it is thrown away."""
        self._first_steps = iter(())
        if self._profile is not None:
            recording, self._profile = self._profile, None
            recording.stop()

    def _wanted(self) -> Iterator[int]:
        """The first kept step of each recording, in order."""
        if self.at_steps is not None:
            return iter(self.at_steps)
        length = self.wait + self.warmup + self.active
        times = count() if self.repeat == 0 else range(self.repeat)
        return (n * length + self.wait + self.warmup for n in times)

    def _choose_next(self, step: int) -> None:
        for first in self._first_steps:
            if first >= step:
                self._first, self._begin = first, max(first - self.warmup, step)
                return
        self._first = self._begin = -1

    def _begin_if_due(self, trainer: BaseTrainer) -> None:
        step = trainer.global_step
        if self._first < 0 or step < self._begin:
            return
        if step > self._first:  # a batch that takes several steps has passed over it
            self._choose_next(step)
            return
        device = trainer.world.device.type
        activities = [ProfilerActivity.CPU]
        if device in ("cuda", "xpu"):
            activities.append(getattr(ProfilerActivity, device.upper()))
        first = self._first

        def action(_: int) -> ProfilerAction:
            is_kept = trainer.global_step >= first
            return ProfilerAction.RECORD if is_kept else ProfilerAction.WARMUP

        self._profile = profile(
            activities=activities,
            schedule=action,
            record_shapes=self.record_shapes,
            profile_memory=self.profile_memory,
            with_stack=self.with_stack,
        )
        self._profile.start()

    def _write(self, recording: profile, trainer: BaseTrainer) -> None:
        start = f"-start-{self._start}" if self._start > 1 else ""
        name = f"step-{self._first:08d}{start}-rank-{trainer.world.rank}"
        suffix = ".pt.trace.json.gz" if self.compress else ".pt.trace.json"
        path = self._into / f"{name}{suffix}"
        with atomic_file(path) as beside:
            # torch looks at the ending of the name.
            named = beside.with_name(f"{beside.name}{suffix}")
            try:
                recording.export_chrome_trace(str(named))
                named.replace(beside)
            finally:
                named.unlink(missing_ok=True)
        by_device = trainer.world.device.type != "cpu"
        averages = recording.key_averages(group_by_input_shape=self.record_shapes)
        self.operations = averages.table(
            sort_by="self_device_time_total" if by_device else "self_cpu_time_total",
            row_limit=self.num_rows,
        )
        write_text(self._into / f"{name}.txt", f"{self.operations}\n")
        self.traces.append(path)
        last = self._first + self.active - 1
        trainer.world.print(f"profiled steps {self._first} to {last}: {path}")


def _next_start(folder: Path) -> int:
    """Which start of the program this is, of those that have written into a folder."""
    names = [path.name for path in folder.glob("step-*-rank-*.pt.trace.json*")]
    found = [int(match[1]) if (match := _START.search(name)) else 1 for name in names]
    return 1 + max(found, default=0)
