"""A save is written behind the training: it holds up nothing, and nothing of it is lost."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from support import TinyTrainer, differences, exact_state, flat, run_ranks, tiny
from torch import nn

from dream_trainer.callbacks import Callback
from dream_trainer.checkpointing import Checkpointer
from dream_trainer.configs import CheckpointParameters
from dream_trainer.errors import CheckpointError
from dream_trainer.storage import StagedState, StagingBuffers, address

# A run seeds the global streams.
pytestmark = pytest.mark.may_leave("rng")

SECONDS = 20.0  # a test that waits longer hangs


class Script:
    """A loop of the user's own, with one layer and SGD."""

    def __init__(self, folder: Path) -> None:
        self.model = nn.Linear(3, 2)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.1, momentum=0.9)
        self.checkpointer = Checkpointer(folder, parameters=CheckpointParameters(keep_last=9))
        self.step_count = 0

    def backward(self) -> None:
        self.model(torch.ones(4, 3)).square().mean().backward()

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step_count += 1

    def state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def save(self) -> Path:
        return self.checkpointer.save(
            self.state(), step=self.step_count, optimizers=[self.optimizer]
        )

    def saved(self, path: Path) -> dict[str, Any]:
        return flat(self.checkpointer.load(path).state)


@pytest.fixture
def script(tmp_path: Path) -> Script:
    made = Script(tmp_path / "checkpoints")
    made.backward()
    made.step()
    return made


def hold(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> threading.Event:
    """Let a call wait until the returned event is set."""
    may_go, original = threading.Event(), getattr(owner, name)

    def held(*args: Any, **kwargs: Any) -> Any:
        assert may_go.wait(SECONDS)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, held)
    return may_go


def test_training_goes_on_while_a_checkpoint_is_written(
    script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = flat(script.state())
    may_write = hold(monkeypatch, sys.modules["dream_trainer.storage.directory"], "write_tree")
    path = script.save()
    for _ in range(3):
        script.backward()
        script.step()
    assert not path.exists()
    may_write.set()
    script.checkpointer.wait()
    assert script.saved(path) == before != flat(script.state())


def test_the_copy_goes_on_beside_a_backward_and_the_next_step_waits_for_it(
    script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = flat(script.state())
    events: list[str] = []
    may_copy = hold(monkeypatch, StagedState, "copy")
    path = script.save()
    script.backward()
    events.append("backward")
    stepping = threading.Thread(target=lambda: (script.step(), events.append("step")))
    stepping.start()
    stepping.join(0.05)
    assert events == ["backward"]  # held
    may_copy.set()
    stepping.join(SECONDS)
    assert events == ["backward", "step"]
    script.checkpointer.wait()
    assert script.saved(path) == before


def test_without_optimizers_everything_is_copied_at_once(
    script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = flat(script.state())
    may_copy = hold(monkeypatch, StagedState, "copy")
    path = script.checkpointer.save(script.state(), step=1)
    with torch.no_grad():
        script.model.weight.zero_()
    may_copy.set()
    script.checkpointer.wait()
    assert script.saved(path) == before


def test_what_no_optimizer_steps_is_copied_at_once() -> None:
    """Frozen and target networks change in the step itself, buffers in the forward."""
    trained, frozen = torch.ones(4), torch.ones(4)
    staged = StagingBuffers().stage({"trained": trained, "frozen": frozen}, {address(trained)})
    frozen.zero_()
    staged.copy()
    staged.wait()
    assert {name: value.tolist() for name, value in staged.entries.items()} == {
        "trained": [1.0] * 4,
        "frozen": [1.0] * 4,
    }


def test_a_change_behind_the_optimizers_back_is_no_checkpoint(
    script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_copy = hold(monkeypatch, StagedState, "copy")
    script.save()
    with torch.no_grad():
        script.model.weight.mul_(2)
    may_copy.set()
    with pytest.raises(CheckpointError, match="changed in place"):
        script.checkpointer.wait()
    assert script.checkpointer.store.paths() == []
    assert not list(script.checkpointer.store.directory.glob(".*"))
    script.save()
    script.checkpointer.wait()  # the next one is a new chance


class Clamps(TinyTrainer):
    """Clips its weights by hand before each step, in a way that torch does not count."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        for parameter in self.net.parameters():
            parameter.data.clamp_(-0.05, 0.05)
        return super().training_step(batch, batch_idx)


def test_weights_that_the_step_itself_changes_are_saved_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def states(async_save: bool) -> dict[int, Any]:
        trainer = tiny(
            tmp_path,
            Clamps,
            experiment=f"{async_save}",
            async_save=async_save,
            every_n_steps=1,
            keep_last=99,
        )
        trainer.fit()
        stored = trainer.checkpointer.store.list()
        return {
            one.manifest.step: flat(trainer.checkpointer.load(one.path).state["models"])
            for one in stored
        }

    within = states(False)
    may_copy = hold(monkeypatch, StagedState, "copy")
    step = Clamps.training_step

    def clipped_before(trainer: TinyTrainer, *args: Any) -> Any:
        clip(trainer)
        if trainer.global_step:  # the copy of the first save happens after the weights were clipped
            may_copy.set()
        return step(trainer, *args)

    monkeypatch.setattr(Clamps, "training_step", clipped_before)
    with pytest.warns(RuntimeWarning, match="changed in place"):
        behind = states(True)
    assert behind == {number: state for number, state in within.items() if number in behind}
    assert len(behind) >= len(within) - 1  # one is noticed, then copies are made at once


def clip(trainer: TinyTrainer) -> None:
    for parameter in trainer.net.parameters():
        parameter.data.clamp_(-0.05, 0.05)


def test_the_buffers_are_used_again(script: Script) -> None:
    buffers, entries = StagingBuffers(), {"w": torch.ones(5), "n": torch.zeros(2, 2)}
    first = buffers.stage(entries)
    second = buffers.stage({"w": torch.zeros(5), "n": torch.ones(3, 2)})
    assert second.entries["w"].data_ptr() == first.entries["w"].data_ptr()
    assert second.entries["n"].tolist() == [[1.0, 1.0]] * 3  # another shape: another buffer
    assert list(buffers.stage({"n": torch.zeros(3, 2)}).entries) == ["n"]


def test_one_save_at_a_time(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = sys.modules["dream_trainer.storage.directory"]
    original, active, seen = directory.write_tree, [0], []

    def write_tree(*args: Any, **kwargs: Any) -> Any:
        active[0] += 1
        seen.append(active[0])
        result = original(*args, **kwargs)
        active[0] -= 1
        return result

    monkeypatch.setattr(directory, "write_tree", write_tree)
    paths = []
    for _ in range(4):
        paths.append(script.save())
        script.backward()
        script.step()
    script.checkpointer.wait()
    assert seen == [1, 1, 1, 1]
    assert script.checkpointer.store.paths() == paths


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere threads have no priority")
def test_the_writer_lets_the_training_go_first(
    script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = sys.modules["dream_trainer.storage.directory"]
    write_tree, found = directory.write_tree, []

    def noted(*arguments: Any) -> Any:
        found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        return write_tree(*arguments)

    monkeypatch.setattr(directory, "write_tree", noted)
    before = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    script.save()
    script.checkpointer.wait()
    assert found == [min(before + 10, 19)]
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before


def test_a_fork_waits_for_the_writer(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    """Locks that the writer holds would stay locked in the child."""
    directory = sys.modules["dream_trainer.storage.directory"]
    original, forked = directory.write_tree, threading.Event()
    order: list[str] = []

    def write_tree(*args: Any, **kwargs: Any) -> Any:
        forked.wait(0.2)  # time enough to fork, if nothing waits
        order.append("written")
        return original(*args, **kwargs)

    monkeypatch.setattr(directory, "write_tree", write_tree)
    script.save()
    if (pid := os.fork()) == 0:
        os._exit(0)
    order.append("forked")
    forked.set()
    os.waitpid(pid, 0)
    script.checkpointer.wait()
    assert order == ["written", "forked"]


def test_a_save_that_failed_is_reported_and_the_next_one_is_made(
    script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = script.save()
    script.checkpointer.wait()
    with monkeypatch.context() as patch:
        fail_to_write(patch)
        script.save()
        with pytest.warns(RuntimeWarning, match="was not saved.*No space left"):
            assert not script.checkpointer.report(wait=True)
    assert script.checkpointer.report(wait=True)  # once is enough
    script.backward()
    script.step()
    second = script.save()
    script.checkpointer.wait()
    assert script.checkpointer.store.paths() == [first, second]


def fail_to_write(patch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    patch.setattr("dream_trainer.storage.directory.write_tree", full)


class DiskFullFor(Callback):
    """The disk is full between two steps."""

    def __init__(self, patch: pytest.MonkeyPatch, first: int, last: int) -> None:
        self.patch, self.first, self.last = patch, first, last

    def post_train_step(self, trainer: Any, *arguments: Any) -> None:
        trainer.checkpointer.report(wait=True)  # which step's save failed is then known
        if trainer.global_step == self.first:
            fail_to_write(self.patch)
        if trainer.global_step == self.last:
            self.patch.undo()


@pytest.mark.parametrize("async_save", [True, False])
def test_a_full_disk_does_not_end_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, async_save: bool
) -> None:
    options = {"every_n_steps": 1, "every_n_epochs": None, "keep_last": 99, "num_samples": 16}
    straight = tiny(tmp_path, experiment="straight", **options)
    straight.fit()
    full = DiskFullFor(monkeypatch, first=3, last=6)
    trainer = tiny(
        tmp_path, callbacks={"full": full}, async_save=async_save, experiment="full", **options
    )
    with pytest.warns(RuntimeWarning, match="bytes needed, .* free in") as warned:
        trainer.fit()
    told = [str(one.message) for one in warned if "was not saved" in str(one.message)]
    failed = [next(n for n in range(9) if f"step-{n:08d}" in text) for text in told]
    assert failed == [3, 4, 5]
    steps = [one.manifest.step for one in trainer.checkpointer.store.list()]
    assert steps == [1, 2, 6, 7, 8]
    assert differences(exact_state(straight), exact_state(trainer)) == []


@pytest.mark.parametrize("async_save", [True, False])
def test_the_end_of_a_run_that_cannot_be_saved_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, async_save: bool
) -> None:
    full = DiskFullFor(monkeypatch, first=5, last=-1)
    trainer = tiny(tmp_path, callbacks={"full": full}, async_save=async_save, num_samples=16)
    with (
        pytest.warns(RuntimeWarning, match="was not saved"),
        pytest.raises(CheckpointError, match="No space left"),
    ):
        trainer.fit()
    assert [one.manifest.step for one in trainer.checkpointer.store.list()] == [4]


def test_too_little_space_is_seen_before_anything_is_written(
    script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 100

    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage)
    written = []
    monkeypatch.setattr(
        "dream_trainer.storage.directory.write_tree", lambda *args, **_: written.append(args)
    )
    script.save()
    with pytest.raises(CheckpointError, match=r"no space left .*bytes needed, 100 free"):
        script.checkpointer.wait()
    assert written == []


class Stops(TinyTrainer):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.global_step == 3:
            raise RuntimeError("of the user's own")
        return super().training_step(batch, batch_idx)


def test_a_run_that_fails_completes_the_save_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = tiny(tmp_path, Stops, every_n_steps=3, every_n_epochs=None)
    may_write = hold(monkeypatch, sys.modules["dream_trainer.storage.directory"], "write_tree")
    release = trainer.release
    monkeypatch.setattr(trainer, "release", lambda: (may_write.set(), release()))
    with pytest.raises(RuntimeError, match="of the user's own"):
        trainer.fit()
    assert [one.manifest.step for one in trainer.checkpointer.store.list()] == [3]


ENDS_AT_ONCE = """
import sys, torch
from dream_trainer import Checkpointer
Checkpointer(sys.argv[1]).save({"w": torch.arange(100_000)}, step=7)
"""


def test_a_program_that_ends_after_a_save_ends_after_its_commit(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", ENDS_AT_ONCE, str(tmp_path)], check=True)
    loaded = Checkpointer(tmp_path).resume("must")
    assert loaded is not None
    assert torch.equal(loaded.state["w"], torch.arange(100_000))


LAYOUTS: dict[str, Any] = {
    "ddp": {"dp_replicate": "auto", "devices": "auto"},
    "fsdp": {"dp_replicate": 1, "dp_shard": 2},
}


FAILS_SILENTLY = """
import sys, torch
import dream_trainer.storage.directory as directory
from dream_trainer import Checkpointer
def full(*args): raise OSError(28, "No space left on device")
directory.write_tree = full
Checkpointer(sys.argv[1]).save({"w": torch.arange(10)}, step=7)
"""


def test_a_program_that_ends_after_a_failed_save_says_so(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FAILS_SILENTLY, str(tmp_path)], capture_output=True, text=True
    )
    assert "a checkpoint was not saved" in done.stderr
    assert "No space left on device" in done.stderr


@pytest.mark.distributed
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_write_the_same_behind_the_training_as_in_it(tmp_path: Path, layout: str) -> None:
    def rank(async_save: bool) -> list[dict[str, Any]]:
        trainer = tiny(
            tmp_path,
            experiment=str(async_save),
            async_save=async_save,
            every_n_steps=1,
            keep_last=99,
            dropout=0.2,
            **LAYOUTS[layout],
        )
        trainer.fit()
        stored = trainer.checkpointer.store.list()
        return [
            {k: v for k, v in flat(trainer.checkpointer.load(one.path).state).items()
             if not k.endswith("progress/seconds")}
            for one in stored
        ]  # fmt: skip

    behind, within = run_ranks(2, rank, True), run_ranks(2, rank, False)
    assert [len(states) for states in behind] == [6, 6]
    assert behind == within
