"""A trainer on a Fabric of the user's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins import MixedPrecision
from support import (
    RecordingCallback,
    TinyTrainer,
    differences,
    exact_state,
    run_ranks,
    tiny,
    tiny_config,
)

from dream_trainer.callbacks import Callback
from dream_trainer.world import DreamFabric

# A run seeds the global streams.
pytestmark = pytest.mark.may_leave("rng")


@pytest.mark.parametrize("kind", [Fabric, DreamFabric])
@pytest.mark.parametrize("is_launched", [False, True])
def test_a_given_fabric_is_used_as_it_is(
    tmp_path: Path, kind: type[Fabric], is_launched: bool
) -> None:
    fabric = kind(accelerator="cpu", devices=1)
    if is_launched:
        fabric.launch()
    trainer = TinyTrainer(tiny_config(tmp_path, enable=False, dropout=0.3), fabric=fabric)
    trainer.fit()
    own = tiny(tmp_path, enable=False, dropout=0.3)
    own.fit()
    assert trainer.world.fabric is fabric
    assert differences(exact_state(own), exact_state(trainer)) == []


def test_callbacks_of_the_fabric_are_called_for_the_hooks_they_define(tmp_path: Path) -> None:
    class Foreign:
        def __init__(self) -> None:
            self.calls: list[str] = []

        def pre_fit(self, trainer: Any) -> None:
            self.calls.append("pre_fit")

        def post_validation_epoch(self, trainer: Any, results: Any) -> None:
            self.calls.append(sorted(results)[0])

        def on_something_else(self) -> None:
            raise AssertionError

    foreign = Foreign()
    fabric = Fabric(accelerator="cpu", devices=1, callbacks=[foreign])
    TinyTrainer(tiny_config(tmp_path, enable=False), fabric=fabric).fit()
    assert foreign.calls == ["pre_fit", "val/loss", "val/loss"]


def test_a_callback_of_ours_on_the_fabric_is_called_and_never_twice(tmp_path: Path) -> None:
    on_fabric, on_both = RecordingCallback(), RecordingCallback()
    fabric = Fabric(accelerator="cpu", devices=1, callbacks=[on_fabric, on_both])
    config = tiny_config(tmp_path, callbacks={"both": on_both}, n_epochs=1, enable=False)
    TinyTrainer(config, fabric=fabric).fit()
    assert on_fabric.calls.count("pre_train_step") == 6
    assert on_fabric.calls == on_both.calls


def test_a_fabric_callback_that_overrides_one_hook_costs_nothing_for_the_others(
    tmp_path: Path,
) -> None:
    class One(Callback):
        def pre_fit(self, trainer: Any) -> None: ...

    fabric = Fabric(accelerator="cpu", devices=1, callbacks=[One()])
    trainer = TinyTrainer(tiny_config(tmp_path, enable=False), fabric=fabric)
    plain = tiny(tmp_path, enable=False)
    assert trainer.callbacks.pre_epoch.__name__ == plain.callbacks.pre_epoch.__name__


@pytest.mark.distributed
@pytest.mark.parametrize("kind", [Fabric, DreamFabric])
def test_a_ddp_fabric_of_the_users_trains_like_our_own(tmp_path: Path, kind: type[Fabric]) -> None:
    def rank() -> list[str]:
        fabric = kind(accelerator="cpu", devices=2, strategy="ddp")
        fabric.launch()
        trainer = TinyTrainer(tiny_config(tmp_path, enable=False), fabric=fabric)
        trainer.fit()
        own = tiny(tmp_path, enable=False)
        own.fit()
        return differences(exact_state(own), exact_state(trainer))

    assert run_ranks(2, rank) == [[], []]


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_the_loss_scale_is_part_of_the_state_and_resumes_exactly(tmp_path: Path) -> None:
    def scaled(**options: Any) -> Any:
        # Fabric itself scales on accelerators only; a scaler for the CPU can be handed in.
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30, growth_interval=3)
        precision = MixedPrecision("16-mixed", device="cpu", scaler=scaler)
        fabric = DreamFabric(accelerator="cpu", devices=1, plugins=[precision])
        config = tiny_config(tmp_path, dropout=0.3, gradient_clip_val=0.5, **options)
        trainer = TinyTrainer(config, fabric=fabric)
        trainer.fit()
        return trainer

    straight = scaled(experiment="straight", max_steps=9)
    scale = straight.state_dict()["precision"]["scale"]
    assert 0 < scale < 2.0**30  # too large at first: steps were skipped and the scale lowered
    scaled(experiment="cut", max_steps=4)
    resumed = scaled(experiment="cut", max_steps=9)
    assert resumed.is_resumed
    assert differences(exact_state(straight), exact_state(resumed)) == []


def test_loggers_of_the_fabric_get_every_row_and_outlive_the_run(tmp_path: Path) -> None:
    class Recorder:
        def __init__(self) -> None:
            self.steps: list[int] = []
            self.is_final = False

        def log_metrics(self, metrics: Any, step: int) -> None:
            self.steps += [step] if "train/loss" in metrics else []

        def finalize(self, status: str) -> None:
            self.is_final = True

    recorder = Recorder()
    fabric = Fabric(accelerator="cpu", devices=1, loggers=[recorder])  # type: ignore[list-item]
    trainer = TinyTrainer(tiny_config(tmp_path, enable=False), fabric=fabric)
    trainer.fit()
    assert recorder.steps == list(range(1, 13))
    assert not recorder.is_final
    assert list(trainer.loggers) == ["fabric_0"]
