"""ResumableRun: a loop of the user's own that goes on where it was, to the bit."""

from __future__ import annotations

import atexit
import contextlib
import sys
import time
import warnings
from collections.abc import Generator, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dream_trainer.callbacks.row_log import RowLog
from dream_trainer.checkpointing import Checkpointer
from dream_trainer.configs import CheckpointParameters
from dream_trainer.coordination import (
    Interrupted,
    Interruption,
    Place,
    Preempted,
    RankFailedError,
    RankWatch,
    StopAgreement,
)
from dream_trainer.data import ResumableLoader
from dream_trainer.dropin.objects import NamedObjects
from dream_trainer.dropin.reading import Reading, reading_of
from dream_trainer.errors import CheckpointError, ConfigError, StateError
from dream_trainer.host_values import Value
from dream_trainer.loggers import LOG_NAME, purge_after
from dream_trainer.metrics import LoggedValues
from dream_trainer.progress import place_in_words
from dream_trainer.randomness import rng_state, set_rng_state
from dream_trainer.storage.run_lock import RunLock
from dream_trainer.world.gradient_sync import fix_bucket_order

if TYPE_CHECKING:
    from types import TracebackType

    from dream_trainer.world import Fabric

_FLUSH_EVERY_N_STEPS = 50


class ResumableRun:
    """Wraps the loops of a script on Fabric; everything else stays as it is.

    ``run.epochs(n)`` takes the place of ``range(n)``, and ``run.batches(loader)`` that of the
    loader. Started again, the script goes through its first lines as ever; the loops go on where
    the newest checkpoint lies. The loader is read as it would be without this, so a run has the
    numbers that it had before.

    A checkpoint lies between two batches, or at the end of an epoch. Ctrl-C and a scheduler's
    signal end the run at such a place, with a save. What the program has in variables of its own is
    not known, unless it is named.

    Args:
        fabric: launched.
        directory: of the run, on a file system that all ranks see: ``checkpoints/`` and
            ``metrics.jsonl``.
        checkpoints: triggers and retention; a step is a batch of `batches`.
        failure_timeout: seconds after which a rank that does not answer has failed.
        objects: what belongs to the run, by name: models and optimizers, as ``fabric.setup``
            returned them or as it got them; schedulers; anything with ``state_dict`` and
            ``load_state_dict``; dicts and lists of plain values, which are changed in place.

    Attributes:
        step: batches that `batches` has handed out and got back, over all restarts.
        epoch: rounds of `epochs` that are over.
        is_resumed: whether the run goes on from a checkpoint; known once a loop has begun.

    Raises:
        ConfigError: an object is of no kind that can be put back.
    """

    def __init__(
        self,
        fabric: Fabric,
        directory: str | Path,
        *,
        checkpoints: CheckpointParameters | None = None,
        failure_timeout: float = 60.0,
        **objects: Any,
    ) -> None:
        from dream_trainer.world import DreamWorld

        self.directory = Path(directory).absolute()
        self.step = self.epoch = 0
        self.is_resumed = False
        self.stop_reason: str | None = None
        self._parameters = checkpoints if checkpoints is not None else CheckpointParameters()
        self._objects = NamedObjects(objects)
        self._world = DreamWorld.from_fabric(fabric)
        self._checkpointer = Checkpointer(
            self.directory / "checkpoints", self._world, self._parameters
        )
        self._lock = RunLock(self.directory)
        self._rows, self._logged = RowLog(), LoggedValues()
        place = Place()
        agreement = StopAgreement(lambda: self._watch.require_all())
        self._watch = RankWatch(place, agreement, failure_timeout)
        self._interruption = Interruption(agreement, is_pointless=self._watch.look_now)
        self._place = place
        self._is_open = self._is_joined = self._is_over = self._has_epochs = False
        self._only: tuple[Any, Reading] | None = None
        self._loaded_only: Mapping[str, Any] = {}
        self._reading: Reading | None = None
        self._position = 0
        self._was_read = self._is_save_asked_for = False
        self._to_resume: Mapping[str, Any] | None = None
        self._saved_at: tuple[int, int] | None = None
        self._last_save = 0.0

    # ------------------------------------------------------------------ the loops

    def epochs(self, epochs: int | Iterable[int]) -> Generator[int, None, None]:
        """The numbers of ``range``, from the epoch on in which the run is.

        Args:
            epochs: how many, or a range of them.

        Raises:
            Interrupted: at the end of an epoch, if Ctrl-C asked for it.
            Preempted: likewise, if a scheduler's signal did.
            CheckpointError: the end of the run could not be saved.
        """
        with self._ended():
            self._open()
            self._has_epochs = True
            for index, epoch in enumerate(range(epochs) if isinstance(epochs, int) else epochs):
                if index < self.epoch:
                    continue
                if self.stop_reason is not None:
                    break
                yield epoch
                if self.stop_reason is None:
                    self._end_epoch()

    def batches(self, loader: Iterable[Any]) -> Batches:
        """What a loader gives, from the batch on at which the run is. Once an epoch.

        Args:
            loader: a ``DataLoader``, with Fabric's wrapper or without, a `ResumableLoader`, a
                loader with ``state_dict``, a list, or anything that can be read again.
        """
        return Batches(self, loader)

    def stop(self, reason: str) -> None:
        """End the loops after the batch under way, on every rank; one of them is enough.

        The run stays ended, unless ``allow_changed`` of ``checkpoints`` has ``"stop_reason"``.
        """
        self._interruption.stop(reason)

    def log(self, values: Mapping[str, Value]) -> None:
        """Log values of the batch under way: a row of ``metrics.jsonl``, averaged over ranks.

        The loggers of the Fabric get it, too. Tensors are not waited for; rows are moved and
        written every 50 batches. What some ranks alone log is averaged over those.
        """
        self._logged.add(values)

    def save(self) -> None:
        """Save after the batch under way, or at the end of the epoch. On every rank."""
        self._is_save_asked_for = True

    def __enter__(self) -> ResumableRun:
        """For a program that goes on after an error: everything is closed at the block's end."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._release()
        self._part(error)

    # ------------------------------------------------------------------ inside

    def _open(self) -> None:
        """Before the first batch: continue, if there is a checkpoint. A collective."""
        if self._is_over:
            raise RuntimeError("this run is over; make another one, with a directory of its own")
        if self._is_open:
            return
        world = self._world
        world.launch()
        world.ranks.on_zero(self._acquire)
        self._interruption.__enter__()
        self._is_open = True
        self._watch.join(world)
        self._is_joined = True
        if world.size > 1:
            atexit.register(self._part_at_exit)
        self._last_save = time.monotonic()
        loaded = self._checkpointer.resume(self._parameters.resume, self._objects.template())
        if loaded is None:
            world.print(f"new run in {self.directory}")
        else:
            self._put_back(loaded.state, str(loaded.path))
            self.is_resumed, self._saved_at = True, (self.step, self.epoch)
            world.print(f"resuming {self.directory} at {self._progress_in_words}")
        writes = world.is_global_zero
        self._rows.open(self.directory / LOG_NAME if writes else None, goes_on=loaded is not None)
        for logger in world.loggers if writes and loaded is not None else ():
            purge_after(logger, self.step)

    def _acquire(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        self._lock.acquire()

    def _read(self, loader: Any) -> Iterator[Any]:
        if self._reading is not None or self._was_read:
            raise RuntimeError(
                "run.batches is read once an epoch: a run that goes on in the middle of a second "
                "loop would come through what is between the two once more. Read what trains "
                "nothing without it, and give another loop that trains an epoch of its own."
            )
        with contextlib.nullcontext() if self._has_epochs else self._ended():
            self._open()
            yield from self._train_on(self._reading_of(loader))
            if not self._has_epochs and self.stop_reason is None:
                self._end_epoch()

    def _train_on(self, reading: Reading) -> Iterator[Any]:
        """The rest of the epoch, batch by batch."""
        if self.stop_reason is not None:
            return
        batches = self._opened(reading)
        self._reading = reading
        try:
            self._place.enter("loader")
            for batch in batches:
                self._place.enter_step(self.step, self.epoch, self._position)
                yield batch
                self._position += 1
                self.step += 1
                self._finish_batch()
                if self.stop_reason is not None:
                    break
                self._place.enter("loader")
        finally:
            self._reading, self._was_read = None, True

    def _opened(self, reading: Reading) -> Iterator[Any]:
        """The rest of the epoch under way, or a whole one."""
        state, self._to_resume, self._position = self._to_resume, None, 0
        if state is None:
            return reading.begin()
        # Once more: what the program did at the beginning of its epoch, to gradients or to a mode,
        # it had done before the batches that are over.
        is_same = self._put_back(state, str(self.directory))
        self._to_resume = None
        if is_same:
            loop = state["dataloaders"]["train"]
            self._position = loop["position"]
            return reading.resume(loop["reading"], self._position)
        loop, world = state["run"]["loop"], self._world
        self._position = loop["position"] * loop["dp_size"] // world.dp_size
        return reading.begin_at(loop["start"], self._position)

    def _reading_of(self, loader: Any) -> Reading:
        world = self._world
        if isinstance(loader, ResumableLoader) and world.size > 1:
            loader.attach(rank=world.dp_rank, size=world.dp_size, any_rank=world.any)
        if (named := self._objects.reading_of(loader)) is not None:
            return named
        if self._only is None:
            self._only = loader, reading_of(loader)
            if self._loaded_only:
                self._only[1].load_state_dict(self._loaded_only)
        if self._only[0] is not loader:
            raise ConfigError(
                "run.batches",
                ["it has read another loader before, and which is which must have a name"],
                "Name both: ResumableRun(..., first=first_loader, second=second_loader).",
            )
        return self._only[1]

    def _finish_batch(self) -> None:
        """A place where the run can end, and be saved."""
        self._take_row()
        if self.step % _FLUSH_EVERY_N_STEPS == 0:
            self._flush()
        self._check()
        if self.stop_reason is not None:
            self._save_at_last()  # outside of the loop nobody would know the place in the epoch
            return
        every = self._parameters.every_n_steps
        is_due = every is not None and self.step % every == 0
        if is_due or self._is_save_asked_for or self._minutes_are_over():
            self._save_if_new()

    def _end_epoch(self) -> None:
        self._take_row()
        self.epoch += 1
        self._position = 0
        self._was_read = False
        self._flush()
        self._check()
        every = self._parameters.every_n_epochs
        if self._is_save_asked_for or (every is not None and self.epoch % every == 0):
            self._save_if_new()

    def _check(self) -> None:
        """Take a signal, or `stop`, on every rank at the same place."""
        try:
            self._interruption.check()
        except (Interrupted, Preempted):
            if self._parameters.on_interrupt:
                self._save_at_last()
                self._world.print(f"saved at step {self.step}; the same command goes on")
            self._release()
            self._part()
            raise
        self.stop_reason = self.stop_reason or self._interruption.stop_reason

    def _minutes_are_over(self) -> bool:
        if (minutes := self._parameters.every_n_minutes) is None:
            return False
        return self._world.broadcast(time.monotonic() - self._last_save >= 60 * minutes)

    def _save_if_new(self) -> None:
        """Save; a failure, of a full disk for example, is told, and the training goes on."""
        if not self._parameters.enable or self._saved_at == (self.step, self.epoch):
            return
        self._checkpointer.report()
        try:
            self._save()
        except CheckpointError as error:
            if self._world.is_global_zero:
                text = f"a checkpoint was not saved. {error}"
                warnings.warn(text, RuntimeWarning, stacklevel=4)

    def _save_at_last(self) -> None:
        """Return once this place is saved."""
        if not self._parameters.enable:
            return
        is_committed = self._checkpointer.report(wait=True)
        if not is_committed or self._saved_at != (self.step, self.epoch):
            self._save()
            self._checkpointer.wait()

    def _save(self) -> None:
        self._saved_at, self._last_save = (self.step, self.epoch), time.monotonic()
        self._is_save_asked_for = False
        self._flush()
        self._rows.sync()
        self._place.enter("save")
        self._checkpointer.save(
            self._state(), step=self.step, epoch=self.epoch, optimizers=self._objects.optimizers
        )

    def _take_row(self) -> None:
        """On ranks also one without values: some programs log on rank 0 alone."""
        values = self._logged.take()
        if values or self._world.size > 1:
            self._rows.add(self.step, self.epoch, values)

    @property
    def _progress_in_words(self) -> str:
        return place_in_words(self.step, self.epoch, self._position > 0)

    def _flush(self) -> None:
        self._rows.flush(self._world, self._world.loggers)

    @contextmanager
    def _ended(self) -> Iterator[None]:
        """Around the outermost loop: at its end all is on the disk, and nothing stays open."""
        try:
            yield
            self._flush()
            self._save_at_last()
            self._world.print(f"done at {self._progress_in_words}: {self.directory}")
        except GeneratorExit:
            # Left by `break`, or by an error of the program, which only its end or `__exit__` see:
            # other ranks may wait for this one, so it does not wait for them.
            self._release()
            if self._world.size == 1:
                self._part()
            raise
        except BaseException as error:
            self._release()
            self._part(error)
            raise
        self._release()
        self._part()

    def _release(self) -> None:
        """Let others in, and signals do what they did."""
        if self._is_open:
            self._is_open, self._is_over = False, True
            self._checkpointer.report(wait=True)
            self._rows.close()
            self._interruption.__exit__(None, None, None)
            self._lock.release()

    def _part(self, error: BaseException | None = None) -> None:
        """Leave the other ranks; with an error, tell them.

        Raises:
            RankFailedError: another rank failed before, and the error follows from it.
        """
        if not self._is_joined:
            return
        self._is_joined = False
        atexit.unregister(self._part_at_exit)
        is_orderly = error is None or isinstance(error, (Interrupted, Preempted))
        first = None if error is None or is_orderly else self._watch.fail(error)
        self._watch.leave()
        if is_orderly:
            self._world.end_side_groups()
        if first is not None:
            raise RankFailedError(first) from error

    def _part_at_exit(self) -> None:
        """The program ends: well after a `break`, or by the error that Python has just printed."""
        with contextlib.suppress(RankFailedError):
            self._part(getattr(sys, "last_value", None))

    # ------------------------------------------------------------------ state

    def _state(self) -> dict[str, Any]:
        world, only = self._world, self._loaded_only
        loop: dict[str, Any] = {}
        of_all: dict[str, Any] = {}
        if (reading := self._reading) is not None:
            loop = {"position": self._position, "reading": reading.state()}
            start = reading.state_of_start()
            of_all = {"position": self._position, "dp_size": world.dp_size, "start": start}
        if self._only is not None:
            only = self._only[1].state_dict()
        return {
            **self._objects.state_dict(world),
            "dataloaders": {"train": loop, "only": dict(only)},
            "precision": world.precision_state(),
            "rng": {"rank": world.rank, **rng_state()},
            "run": {
                "step": self.step,
                "epoch": self.epoch,
                "stop_reason": self.stop_reason,
                "loop": of_all,
                "only": dict(only),
                "log": self._rows.state_dict(),
                "size": world.size,
                "strategy": type(world.strategy).__name__,
            },
        }

    def _put_back(self, state: Mapping[str, Any], place: str) -> bool:
        """Put everything back; whether also what differs by rank, and so to the bit."""
        if problems := self._objects.problems(state):
            raise StateError(
                place,
                problems,
                "It is of another program. Nothing was changed: put the names and the model back, "
                "or choose another directory.",
            )
        own, world = state["run"], self._world
        is_same = (own["size"], own["strategy"]) == (world.size, type(world.strategy).__name__)
        is_same = is_same and state.get("rng", {}).get("rank") == world.rank
        self.step, self.epoch = own["step"], own["epoch"]
        if "stop_reason" not in self._parameters.allow_changed:
            self.stop_reason = own["stop_reason"]
        if self.step and not self.is_resumed:
            for model in self._objects.given_models:
                fix_bucket_order(model)
        self._objects.load_state_dict(state, is_same_rank=is_same)
        world.load_precision_state(state["precision"])
        self._rows.load_state_dict(own["log"])
        self._loaded_only = (state["dataloaders"] if is_same else own)["only"]
        self._to_resume = state if own["loop"] else None
        if is_same:
            set_rng_state(state["rng"])
        elif not self.is_resumed and world.is_global_zero:
            warnings.warn(
                f"the checkpoint is of {own['size']} ranks under {own['strategy']}: random draws "
                "and gradients of a step that was not taken are not carried over. Of the epoch "
                "under way a ResumableLoader reads every sample once; another loader may give some "
                "twice or never.",
                stacklevel=5,
            )
        return is_same


class Batches(Sized):
    """What `ResumableRun.batches` gives: read it once."""

    def __init__(self, run: ResumableRun, loader: Any) -> None:
        self._run, self._loader = run, loader

    def __iter__(self) -> Iterator[Any]:
        return self._run._read(self._loader)

    def __len__(self) -> int:
        """Batches of a whole epoch, if the loader can tell."""
        return len(self._loader)

    def enumerate(self, start: int = 0) -> Iterator[tuple[int, Any]]:
        """Like Python's, but a run that goes on counts from where it is."""
        for batch in self:
            yield start + self._run._position, batch


__all__ = ["Batches", "ResumableRun"]
