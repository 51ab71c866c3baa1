"""A checkpoint may be taken after any batch and in any hook after one, also inside a window."""

from __future__ import annotations

import os
import signal
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
    mlp,
    run_ranks,
    tiny,
)
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torchmetrics import MeanMetric

from dream_trainer.callbacks import Callback
from dream_trainer.callbacks.callback import HOOKS
from dream_trainer.coordination import Interrupted

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


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(mlp() for _ in range(3))

    def forward(self, x: Tensor, branch: int) -> Tensor:
        return self.branches[branch](x)  # type: ignore[no-any-return]


class Branching(TinyTrainer):
    """Each batch of a window goes through a branch of its own; the others are unused."""

    def configure_models(self) -> None:
        self.net = Branches()

    def compute_loss(self, batch: Any, batch_idx: int) -> Any:
        return (self.net(batch["x"], batch_idx % 3) - batch["y"]).square().mean()


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


def run(
    root: Path,
    name: str,
    callbacks: dict[str, Any],
    kind: type[TinyTrainer] = Weighted,
    **options: Any,
) -> Any:
    defaults = {"n_epochs": 2, "num_samples": 26, "num_val_samples": 6, "dropout": 0.2}
    defaults |= {"gradient_accumulation_steps": 3, "val_every_n_steps": 2, "async_save": False}
    trainer = tiny(root, kind, experiment=name, callbacks=callbacks, **defaults | options)
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
@pytest.mark.parametrize("layout", ["ddp", "ddp with unused parameters", "fsdp", "fsdp in bf16"])
def test_on_ranks_too(tmp_path: Path, layout: str) -> None:
    devices, kind = (DDP if layout == "ddp" else FSDP), Weighted
    if layout == "fsdp in bf16":
        devices = devices | {"precision": "bf16-mixed"}  # accumulates in a type of its own
    if layout == "ddp with unused parameters":
        devices, kind = {"strategy": "ddp_find_unused_parameters_true", "devices": 2}, Branching

    def rank(name: str, resume: str = "auto") -> Any:
        saves = SavesIn("post_train_step", tmp_path / f"kept-{name}", RecordingCallback())
        options = {"num_samples": 48, "resume": resume, **devices}
        return exact_state(run(tmp_path, name, {"saves": saves}, kind, **options))

    def resumed_from_each() -> Any:
        kept = tmp_path / "kept-straight"
        return {number: rank(f"resumed-{number}", str(kept / str(number))) for number in (1, 4)}

    straight = run_ranks(2, rank, "straight")
    directories = tmp_path / "default" / "default"
    log = (directories / "straight" / "metrics.jsonl").read_bytes()
    for number in (1, 4):
        (directories / f"resumed-{number}").mkdir()
        (directories / f"resumed-{number}" / "metrics.jsonl").write_bytes(log)
    for end, ends in zip(straight, run_ranks(2, resumed_from_each), strict=True):
        for number, state in ends.items():
            assert differences(end, state) == [], number
            assert (directories / f"resumed-{number}" / "metrics.jsonl").read_bytes() == log


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


class Averaged(Callback):
    """Validates with other weights than those that train, and puts them back."""

    def pre_validation_epoch(self, trainer: Any) -> None:
        self.own = [p.detach().clone() for p in trainer.net.parameters()]
        self.put(trainer, [p / 2 for p in self.own])

    def post_validation_epoch(self, trainer: Any, results: Any) -> None:
        self.put(trainer, self.own)

    def put(self, trainer: Any, values: Any) -> None:
        with torch.no_grad():
            for parameter, value in zip(trainer.net.parameters(), values, strict=True):
                parameter.copy_(value)


class CtrlC(Callback):
    def post_validation_step(self, trainer: Any, result: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 6 and batch_idx == 0:
            os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_in_a_validation_saves_what_trains(tmp_path: Path) -> None:
    whole = tiny(tmp_path, experiment="whole", callbacks={"averaged": Averaged()})
    whole.fit()
    callbacks = {"averaged": Averaged(), "stop": CtrlC()}
    with pytest.raises(Interrupted):
        tiny(tmp_path, experiment="parts", callbacks=callbacks).fit()
    rest = tiny(tmp_path, experiment="parts", callbacks={"averaged": Averaged()})
    rest.fit()
    assert rest.is_resumed
    assert differences(exact_state(whole), exact_state(rest)) == []
