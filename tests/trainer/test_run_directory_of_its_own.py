"""A run directory belongs to one run and one process; what is in it is not lost."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lightning.fabric.loggers import TensorBoardLogger
from support import TinyTrainer, differences, exact_state, tiny

from dream_trainer.callbacks import Callback
from dream_trainer.checkpointing import CheckpointStore
from dream_trainer.errors import ConfigError

# A run seeds the global streams.
pytestmark = pytest.mark.may_leave("rng")

HOLDS = """
import sys, time
from pathlib import Path
from dream_trainer.storage.run_lock import RunLock
lock = RunLock(Path(sys.argv[1]))
lock.acquire()
print("held", flush=True)
sys.stdin.read()
"""


def test_a_second_process_is_refused_and_a_killed_one_holds_nothing(tmp_path: Path) -> None:
    first = tiny(tmp_path, max_steps=2)
    first.fit()
    before = sorted(first.run_directory.rglob("*"))
    command = [sys.executable, "-c", HOLDS, str(first.run_directory)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(ConfigError, match=f"process {other.pid} on .* is training in"):
            tiny(tmp_path).fit()
        assert sorted(first.run_directory.rglob("*")) == before
        assert tiny(tmp_path).validate()  # reading is harmless
        other.send_signal(signal.SIGKILL)
    tiny(tmp_path).fit()


def test_a_refused_start_makes_no_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no checkpoint"):
        tiny(tmp_path, resume="must").fit()
    assert list(tmp_path.iterdir()) == []


def test_the_log_of_a_run_whose_checkpoints_were_deleted_is_kept(tmp_path: Path) -> None:
    first = tiny(tmp_path)
    first.fit()
    log = first.run_directory / "metrics.jsonl"
    written = log.read_bytes()
    for stored in first.checkpointer.store.list():
        stored.path.rename(tmp_path / stored.path.name)
    tiny(tmp_path).fit()
    assert log.with_name("metrics.jsonl.superseded-1").read_bytes() == written
    assert log.read_bytes() == written


def test_a_log_that_was_edited_is_kept_and_a_new_one_begins(tmp_path: Path) -> None:
    tiny(tmp_path, max_steps=4).fit()
    trainer = tiny(tmp_path, max_steps=8)
    log = Path(tmp_path, "default", "default", "tiny", "metrics.jsonl")
    edited = log.read_bytes()[:-5]
    log.write_bytes(edited)
    with pytest.warns(UserWarning, match="does not begin with"):
        trainer.fit()
    assert log.with_name("metrics.jsonl.superseded-1").read_bytes() == edited
    rows = [json.loads(line) for line in log.read_bytes().splitlines()]
    assert [row["step"] for row in rows] == [5, 6, 6, 7, 8]


def test_a_checkpoint_of_another_run_replaces_nothing_of_this_one(tmp_path: Path) -> None:
    options = {"every_n_steps": 2, "keep_last": 99}
    one = tiny(tmp_path, experiment="one", max_steps=6, **options)
    one.fit()
    other = tiny(tmp_path, experiment="other", max_steps=8, lr=0.01, **options)
    other.fit()
    log = other.run_directory / "metrics.jsonl"
    written = log.read_bytes()
    path = str(one.checkpointer.store.paths()[0])
    forked = tiny(tmp_path, experiment="other", max_steps=6, resume=path, **options)
    with pytest.warns(UserWarning, match="renamed step-00000002 to step-00000008"):
        forked.fit()
    names = sorted(p.name for p in forked.checkpointer.store.directory.glob("step-*"))
    aside = [name for name in names if name.endswith(".superseded-1")]
    assert [int(name[5:13]) for name in aside] == [2, 4, 6, 8]
    assert [one.manifest.step for one in forked.checkpointer.store.list()] == [4, 6]
    assert log.with_name("metrics.jsonl.superseded-1").read_bytes() == written


def test_other_retention_rules_delete_nothing_before_a_new_checkpoint_is_there(
    tmp_path: Path,
) -> None:
    first = tiny(tmp_path, every_n_steps=2, keep_every_n_steps=2)
    first.fit()
    kept = first.checkpointer.store.paths()
    tiny(tmp_path).fit()  # finds it done
    assert first.checkpointer.store.paths() == kept


class StopsAt(Callback):
    def on_boundary(self, trainer: Any) -> None:
        if trainer.global_step == 3:
            trainer.stop("enough")


def test_a_run_that_was_stopped_is_done_also_after_a_restart(tmp_path: Path) -> None:
    options: dict[str, Any] = {"callbacks": {"stops": StopsAt()}, "every_n_steps": 1}
    tiny(tmp_path, **options).fit()
    again = tiny(tmp_path)
    again.fit()
    assert (again.global_step, again.stop_reason) == (3, "enough")
    on = tiny(tmp_path, allow_changed=["stop_reason"])
    on.fit()
    assert on.global_step == 12


class FullFor(Callback):
    """The log's disk is full for some steps."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch = patch

    def pre_train_step(self, trainer: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 2:
            self.patch.setattr("os.fsync", self._full)
        if trainer.global_step == 5:
            self.patch.undo()

    @staticmethod
    def _full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_rows_that_a_full_disk_has_no_place_for_are_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"every_n_steps": 1, "num_samples": 32}
    straight = tiny(tmp_path, experiment="straight", **options)
    straight.fit()
    trainer = tiny(tmp_path, experiment="full", callbacks={"full": FullFor(monkeypatch)}, **options)
    with pytest.warns(RuntimeWarning, match="are kept in memory until they can be written"):
        trainer.fit()
    logs = [(t.run_directory / "metrics.jsonl").read_bytes() for t in (straight, trainer)]
    assert logs[0] == logs[1]
    assert differences(exact_state(straight), exact_state(trainer)) == []


def test_the_newest_and_the_best_are_found_by_name(tmp_path: Path) -> None:
    trainer = tiny(tmp_path, n_epochs=4, monitor="val/loss", keep_last=9, lr=0.3)
    trainer.fit()
    store = trainer.checkpointer.store
    best = store.best("min")
    assert best is not None
    assert (store.directory / "newest").resolve() == store.paths()[-1].resolve()
    assert (store.directory / "best").resolve() == best.path.resolve()
    assert (store.directory / "best").readlink() == Path(best.path.name)  # also after a move
    tiny(tmp_path, resume=str(store.directory / "newest")).validate()


def test_every_validation_can_be_saved(tmp_path: Path) -> None:
    trainer = tiny(
        tmp_path,
        after_validation=True,
        every_n_epochs=None,
        val_every_n_steps=4,
        keep_last=99,
        keep_top_k=0,
        monitor="val/loss",
    )
    trainer.fit()
    stored = CheckpointStore(trainer.checkpointer.store.directory).list()
    assert [one.manifest.step for one in stored] == [4, 6, 8, 12]
    assert all(one.manifest.monitored_value is not None for one in stored)


def test_tensorboard_hides_what_a_killed_run_wrote_after_its_checkpoint(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    class Stops(TinyTrainer):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.global_step == 9 and not self.is_resumed:
                raise RuntimeError("killed")
            return super().training_step(batch, batch_idx)

    def run(experiment: str, kind: type[TinyTrainer]) -> None:
        logger = TensorBoardLogger(tmp_path / "board", experiment, version="")
        trainer = tiny(tmp_path, kind, experiment=experiment, loggers={"board": logger})
        trainer.callbacks["metrics"].flush_every_n_rows = 1
        trainer.fit()

    def points(experiment: str) -> list[tuple[int, float]]:
        board = EventAccumulator(str(tmp_path / "board" / experiment)).Reload()
        return [(event.step, event.value) for event in board.Scalars("train/loss")]

    run("straight", TinyTrainer)
    with pytest.raises(RuntimeError, match="killed"):
        run("killed", Stops)
    assert [step for step, _ in points("killed")] == list(range(1, 10))
    run("killed", Stops)
    assert points("killed") == points("straight")
