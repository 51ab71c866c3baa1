"""A run resumed from any of its checkpoints is the run that was never interrupted."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from support import RecordingCallback, TinyTrainer, differences, exact_state, tiny
from torchmetrics import MeanMetric

from dream_trainer.callbacks import CheckpointCallback

# A run seeds the global streams.
pytestmark = pytest.mark.may_leave("rng")

CELLS = {
    "plain": {},
    "dropout": {"dropout": 0.3},
    "augmentation": {"augment": True},
    "both": {"dropout": 0.3, "augment": True},
}


class Measured(TinyTrainer):
    def configure_metrics(self) -> None:
        self.error = MeanMetric()

    def compute_loss(self, batch: Any, batch_idx: int) -> Any:
        loss = super().compute_loss(batch, batch_idx)
        self.error.update(loss)
        return loss


class KeepsEverySave(CheckpointCallback):
    """Copies every checkpoint away, with the hooks that were called before it."""

    def __init__(self, recording: RecordingCallback, keep_in: Path) -> None:
        super().__init__()
        self.recording, self.keep_in = recording, keep_in
        self.kept: list[tuple[Path, int]] = []

    def on_boundary(self, trainer: Any) -> None:
        super().on_boundary(trainer)
        trainer.checkpointer.wait()
        path = trainer.checkpointer.store.paths()[-1]
        copy = self.keep_in / str(len(self.kept)) / path.name
        shutil.copytree(path, copy)
        self.kept.append((copy, len(self.recording.calls)))


def run(root: Path, experiment: str, callbacks: dict[str, Any], options: Any) -> Any:
    trainer = tiny(
        root,
        Measured,
        experiment=experiment,
        callbacks=callbacks,
        n_epochs=2,
        num_samples=18,
        num_val_samples=6,
        gradient_accumulation_steps=2,
        gradient_clip_val=0.5,
        val_every_n_steps=2,
        **options,
    )
    trainer.fit()
    return trainer


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("cell", CELLS)
def test_every_checkpoint_leads_to_the_same_end(
    tmp_path: Path, cell: str, num_workers: int
) -> None:
    options = CELLS[cell] | {"num_workers": num_workers}
    saving = options | {"every_n_steps": 1}
    recording = RecordingCallback()
    keeps = KeepsEverySave(recording, tmp_path / "kept")
    straight = run(tmp_path, "straight", {"recording": recording, "checkpoint": keeps}, saving)
    state = exact_state(straight)
    log = (straight.run_directory / "metrics.jsonl").read_bytes()
    assert len(keeps.kept) == 8  # 3 steps and an end, twice

    for number, (checkpoint, calls_before) in enumerate(keeps.kept):
        if num_workers and number % 2:
            continue  # workers cost a start each time; the other cells have all of them
        directory = straight.run_directory.with_name(f"resumed-{number}")
        shutil.copytree(checkpoint, directory / "checkpoints" / checkpoint.name)
        (directory / "metrics.jsonl").write_bytes(log + b'{"step": 99}\n')
        again = RecordingCallback()
        resumed = run(tmp_path, directory.name, {"recording": again}, options)
        assert resumed.is_resumed
        assert differences(state, exact_state(resumed)) == [], checkpoint
        assert (directory / "metrics.jsonl").read_bytes() == log, checkpoint
        after = again.calls[again.calls.index("pre_fit") + 1 :]
        assert recording.calls[:calls_before] + after == recording.calls, checkpoint


def test_saving_does_not_change_what_is_trained(tmp_path: Path) -> None:
    states, logs = [], []
    for name, every in (("each", 1), ("last", None)):
        trainer = tiny(tmp_path, experiment=name, every_n_steps=every, **CELLS["both"])
        trainer.fit()
        states.append(exact_state(trainer))
        logs.append((trainer.run_directory / "metrics.jsonl").read_bytes())
    assert differences(*states) == []
    assert logs[0] == logs[1]


def test_the_number_of_workers_may_change_at_a_restart(tmp_path: Path) -> None:
    straight = tiny(tmp_path, experiment="straight", max_steps=6, **CELLS["both"])
    straight.fit()
    tiny(tmp_path, experiment="cut", max_steps=2, **CELLS["both"]).fit()
    resumed = tiny(tmp_path, experiment="cut", max_steps=6, num_workers=2, **CELLS["both"])
    resumed.fit()
    assert differences(exact_state(straight), exact_state(resumed)) == []


def test_many_interruptions_are_like_one_run(tmp_path: Path) -> None:
    options: dict[str, Any] = {"num_samples": 20, "n_epochs": 2, **CELLS["both"]}
    straight = tiny(tmp_path, Measured, experiment="straight", max_steps=10, **options)
    straight.fit()
    for step in range(1, 11):
        trainer = tiny(tmp_path, Measured, experiment="cut", max_steps=step, **options)
        trainer.fit()
    assert differences(exact_state(straight), exact_state(trainer)) == []
    one, other = ((t.run_directory / "metrics.jsonl").read_bytes() for t in (straight, trainer))
    assert one == other
