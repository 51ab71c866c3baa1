"""A checkpoint may be taken after any batch and in any hook after one, also inside a window."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import (
    RecordingCallback,
    TinyTrainer,
    differences,
    exact_state,
    run_ranks,
    tiny,
)
from torch.distributed.tensor import DTensor
from torchmetrics import MeanMetric

from dream_trainer.callbacks import Callback
from dream_trainer.callbacks.callback import HOOKS

# A run seeds the global streams.
pytestmark = pytest.mark.may_leave("rng")

DDP: dict[str, Any] = {"dp_replicate": "auto", "devices": "auto"}
FSDP: dict[str, Any] = {"dp_replicate": 1, "dp_shard": 2}


class Weighted(TinyTrainer):
    """Batches weigh differently; a metric over the epoch; a value is logged for every batch."""

    def configure_metrics(self) -> None:
        self.error = MeanMetric()

    def compute_loss(self, batch: Any, batch_idx: int) -> Any:
        loss = super().compute_loss(batch, batch_idx)
        self.error.update(loss.detach())
        if self.is_fitting:
            self.log("batch", float(batch_idx))
        return {"loss": loss, "weight": batch["x"].abs().sum().detach()}


class SavesIn(Callback):
    """Saves in every call of a hook, and keeps the log and the calls of that moment."""

    def __init__(self, hook: str, folder: Path, recording: RecordingCallback) -> None:
        self.folder, self.recording, self.calls_before = folder, recording, []
        setattr(self, hook, self._save)

    def _save(self, trainer: Any, *arguments: Any) -> None:
        trainer.save_checkpoint(self.folder / f"{len(self.calls_before)}")
        self.calls_before.append(len(self.recording.calls))


for _hook in HOOKS:
    # The list of callbacks asks the class whether a hook is overridden.
    setattr(SavesIn, _hook, lambda self, *arguments: None)


def run(root: Path, name: str, callbacks: dict[str, Any], **options: Any) -> Any:
    defaults = {"n_epochs": 2, "num_samples": 26, "num_val_samples": 6, "dropout": 0.2}
    defaults |= {"gradient_accumulation_steps": 3, "val_every_n_steps": 2, "async_save": False}
    trainer = tiny(root, Weighted, experiment=name, callbacks=callbacks, **defaults | options)
    trainer.fit()
    return trainer


SAVES = {
    "post_train_step": 14,
    "post_validation_epoch": 4,
    "post_train_epoch": 2,
    "post_epoch": 2,
    "on_boundary": 8,
}


@pytest.mark.parametrize("hook", SAVES)
def test_every_save_leads_to_the_same_end(tmp_path: Path, hook: str) -> None:
    recording = RecordingCallback()
    saves = SavesIn(hook, tmp_path / "kept", recording)
    straight = run(tmp_path, "straight", {"recording": recording, "saves": saves})
    log = (straight.run_directory / "metrics.jsonl").read_bytes()
    assert len(saves.calls_before) == SAVES[hook]

    for number, calls_before in enumerate(saves.calls_before):
        again = RecordingCallback()
        directory = straight.run_directory.with_name(f"resumed-{number}")
        directory.mkdir()
        (directory / "metrics.jsonl").write_bytes(log + b'{"step": 99}\n')
        path = str(tmp_path / "kept" / str(number))
        resumed = run(tmp_path, directory.name, {"recording": again}, resume=path)
        assert differences(exact_state(straight), exact_state(resumed)) == [], number
        assert (directory / "metrics.jsonl").read_bytes() == log, number
        after = again.calls[again.calls.index("pre_fit") + 1 :]
        assert recording.calls[:calls_before] + after == recording.calls, number


def test_a_save_between_the_batches_of_a_validation_is_refused(tmp_path: Path) -> None:
    """Streams and modes are the validation's there; a resumed run would train with them."""
    saves = SavesIn("post_validation_step", tmp_path / "kept", RecordingCallback())
    with pytest.raises(RuntimeError, match="between the batches of a validation"):
        run(tmp_path, "refused", {"saves": saves})
    assert not (tmp_path / "kept").exists()


@pytest.mark.distributed
@pytest.mark.parametrize("layout", ["ddp", "fsdp", "fsdp in bf16"])
def test_on_ranks_too(tmp_path: Path, layout: str) -> None:
    devices = DDP if layout == "ddp" else FSDP
    if layout == "fsdp in bf16":
        devices = devices | {"precision": "bf16-mixed"}  # accumulates in a type of its own

    def rank(name: str, number: int | None) -> Any:
        path = "auto" if number is None else str(tmp_path / "kept-straight" / str(number))
        saves = SavesIn("post_train_step", tmp_path / f"kept-{name}", RecordingCallback())
        callbacks = {"saves": saves}
        trainer = run(tmp_path, name, callbacks, num_samples=48, resume=path, **devices)
        return exact_state(trainer)

    straight = run_ranks(2, rank, "straight", None)
    log = (tmp_path / "default" / "default" / "straight" / "metrics.jsonl").read_bytes()
    for number in (0, 1, 4):
        directory = tmp_path / "default" / "default" / f"resumed-{number}"
        directory.mkdir()
        (directory / "metrics.jsonl").write_bytes(log)
        resumed = run_ranks(2, rank, directory.name, number)
        assert [differences(*pair) for pair in zip(straight, resumed, strict=True)] == [[], []]
        assert (directory / "metrics.jsonl").read_bytes() == log


@pytest.mark.distributed
def test_on_another_layout_the_window_is_done_again(tmp_path: Path) -> None:
    """Every sample is part of exactly one step, of the same one as without the change."""

    def rank(name: str, devices: dict[str, Any], batch: int, path: str = "auto") -> Any:
        torch.set_default_dtype(torch.float64)
        options = {"global_batch_size": 24, "batch_size": batch, "dropout": 0.0, "resume": path}
        saves = SavesIn("post_train_step", tmp_path / f"kept-{name}", RecordingCallback())
        trainer = run(
            tmp_path,
            name,
            {"saves": saves},
            num_samples=48,
            gradient_accumulation_steps=1,
            **options,
            **devices,
        )
        models = trainer.state_dict()["models"]["net"]
        whole = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in models.items()}
        return {k: v.tolist() for k, v in whole.items()}, trainer.seen

    ddp, _ = run_ranks(2, rank, "straight", DDP, 4)[0]
    kept = str(tmp_path / "kept-straight" / "1")  # 16 of 24 samples
    whole, order = run_ranks(1, rank, "one", {}, 8)[0]
    again, seen = run_ranks(1, rank, "resumed", {}, 8, kept)[0]
    assert seen == order  # from the window's beginning, which is the epoch's
    sharded, _ = run_ranks(2, rank, "sharded", FSDP, 4, kept)[0]
    for one, other in ((whole, again), (ddp, sharded)):
        for name, value in one.items():
            assert np.allclose(other[name], value, rtol=1e-10, atol=1e-12), name
