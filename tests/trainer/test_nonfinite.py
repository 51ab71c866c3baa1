"""A step that is not finite is left out, on all ranks together, and leaves no trace."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support import (
    TinyTrainer,
    differences,
    exact_state,
    flat,
    run_ranks,
    tiny,
    weights,
)
from torch import nn

from dream_trainer.callbacks import Callback
from dream_trainer.errors import ConfigError, NonFiniteError

# A run seeds the global streams.
pytestmark = pytest.mark.may_leave("rng")


class Normed(TinyTrainer):
    """Has running statistics; the samples with some indices are not finite."""

    bad_batches: tuple[int, ...] = (2,)
    bad_rank: int | None = None
    what = "input"

    def configure_models(self) -> None:
        self.net = nn.Sequential(
            nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(self.config.dropout), nn.Linear(8, 1)
        )

    def compute_loss(self, batch: Any, batch_idx: int) -> Any:
        is_bad = (
            torch.is_grad_enabled()
            and batch_idx in self.bad_batches
            and self.bad_rank in (None, self.world.rank)
        )
        if is_bad and self.what == "input":
            batch = batch | {"x": batch["x"] * float("nan")}
        loss = super().compute_loss(batch, batch_idx)
        # A constant has no gradient: only the loss itself is infinite.
        return loss + float("inf") if is_bad and self.what == "loss" else loss


class Before(Callback):
    """Keeps what a step found, and what it left."""

    def __init__(self) -> None:
        self.found: list[dict[str, Any]] = []
        self.left: list[dict[str, Any]] = []

    def pre_train_step(self, trainer: Any, batch: Any, batch_idx: int) -> None:
        self.found.append(self._state(trainer))

    def post_train_step(self, trainer: Any, result: Any, batch: Any, batch_idx: int) -> None:
        self.left.append(self._state(trainer))

    def _state(self, trainer: Any) -> dict[str, Any]:
        state = trainer.components.state_dict()
        moments = {name: one["state"] for name, one in state["optimizers"].items()}
        return flat({"models": state["models"], "moments": moments})


def skipping(root: Path, kind: type[Normed] = Normed, **options: Any) -> Any:
    return tiny(root, kind, **{"n_epochs": 1, "on_nonfinite": "skip"} | options)


@pytest.mark.parametrize("what", ["input", "loss"])
def test_a_skipped_step_leaves_everything_as_it_was(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kind = type("Bad", (Normed,), {"what": what})
    trainer = skipping(tmp_path, kind, callbacks={"before": Before()})
    trainer.fit()
    before = trainer.callbacks["before"]
    changed = [differences(*pair) for pair in zip(before.found, before.left, strict=True)]
    assert [bool(one) for one in changed] == [True, True, False, True, True, True]
    assert trainer.global_step == 6
    assert trainer.progress.num_skipped_steps == 1
    assert trainer.progress.num_skipped_in_a_row == {}
    told = "skipped step 3 (epoch 0, batch 2) of optimizer net: the loss is not finite; 1 skipped"
    assert told in capsys.readouterr().out
    lines = (trainer.run_directory / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [r["step"] for r in rows if "train/skipped_steps" in r] == [3]


def test_a_gradient_that_is_not_finite_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Spoils(Callback):
        def pre_optimizer_step(self, trainer: Any, optimizer: Any) -> None:
            if trainer.global_step == 1:
                trainer.net.get_parameter("1.weight").grad[3] = float("inf")

    trainer = skipping(
        tmp_path, type("Good", (Normed,), {"bad_batches": ()}), callbacks={"spoils": Spoils()}
    )
    trainer.fit()
    assert "the gradient of net.1.weight is not finite" in capsys.readouterr().out
    assert trainer.progress.num_skipped_steps == 1


def test_one_skip_too_many_in_a_row_ends_the_run(tmp_path: Path) -> None:
    kind = type("Bad", (Normed,), {"bad_batches": (0, 2, 3, 4, 5)})
    trainer = skipping(tmp_path, kind, max_skipped_in_a_row=2, every_n_steps=1)
    message = r"step 5 \(epoch 0, batch 4\) of optimizer net: .* after 2 skipped in a row"
    with pytest.raises(NonFiniteError, match=message):
        trainer.fit()
    again = skipping(tmp_path, kind, max_skipped_in_a_row=2, every_n_steps=1)
    with pytest.raises(NonFiniteError, match=message):  # the count goes on after a restart
        again.fit()
    assert skipping(tmp_path, kind, max_skipped_in_a_row=None).fit() is None


def test_the_first_ten_are_told_one_by_one_and_then_every_hundredth(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kind = type("Bad", (Normed,), {"bad_batches": range(6)})
    trainer = skipping(tmp_path, kind, max_skipped_in_a_row=None, n_epochs=17)
    trainer.fit()
    told = re.findall(r"^skipped step (\d+) ", capsys.readouterr().out, flags=re.MULTILINE)
    assert told == [*map(str, range(1, 11)), "100"]
    assert trainer.progress.num_skipped_steps == 17 * 6


def test_two_optimizers_have_counts_of_their_own(tmp_path: Path) -> None:
    class Two(TinyTrainer):
        def configure_models(self) -> None:
            self.one, self.two = nn.Linear(3, 1), nn.Linear(3, 1)

        def configure_optimizers(self) -> Any:
            return {
                name: torch.optim.SGD(getattr(self, name).parameters(), lr=0.1)
                for name in ("one", "two")
            }

        def configure_schedulers(self) -> Any:
            return None

        def training_step(self, batch: Any, batch_idx: int) -> None:
            for name in ("one", "two"):
                loss = (getattr(self, name)(batch["x"]) - batch["y"]).square().mean()
                self.backward(loss * float("nan") if name == "two" else loss)
                self.step(name)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            pass

    trainer = skipping(tmp_path, Two, max_skipped_in_a_row=3)
    with pytest.raises(NonFiniteError, match=r"batch 3\) of optimizer two"):
        trainer.fit()
    assert trainer.progress.num_skipped_in_a_row == {"two": 4}
    assert all(parameter.isfinite().all() for parameter in trainer.two.parameters())


def test_a_window_with_one_bad_batch_is_skipped_as_a_whole(tmp_path: Path) -> None:
    trainer = skipping(
        tmp_path, gradient_accumulation_steps=2, callbacks={"before": Before()}
    )  # the third of six batches: the second of three windows
    trainer.fit()
    before = trainer.callbacks["before"]
    assert trainer.progress.num_skipped_steps == 1
    assert differences(before.found[2], before.left[3]) == []


class InterruptsOnce(Callback):
    def post_train_step(self, trainer: Any, result: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2 and not trainer.is_resumed:
            raise_signal(trainer)


def raise_signal(trainer: Any) -> None:
    import os
    import signal

    os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupted_window_is_skipped_after_the_restart(tmp_path: Path) -> None:
    options: dict[str, Any] = {"gradient_accumulation_steps": 2, "n_epochs": 2, "dropout": 0.2}
    whole = skipping(tmp_path, experiment="whole", **options)
    whole.fit()
    options["callbacks"] = {"interrupts": InterruptsOnce()}
    with pytest.raises(KeyboardInterrupt):
        skipping(tmp_path, experiment="cut", **options).fit()
    cut = skipping(tmp_path, experiment="cut", **options)
    cut.fit()
    assert whole.progress.num_skipped_steps == cut.progress.num_skipped_steps == 2
    assert differences(exact_state(whole), exact_state(cut)) == []


class TakesTurns(Normed):
    """A second model, with statistics, that is run after the step and steps in turns of its own."""

    bad_batches = (3,)

    def configure_models(self) -> None:
        super().configure_models()
        self.other = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1))

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(one.parameters(), 0.05) for one in (self.net, self.other)]

    def configure_schedulers(self) -> Any:
        return None

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.backward(self.compute_loss(batch, batch_idx))
        self.step("net")
        loss = self.other(batch["x"]).square().mean()
        if batch_idx % 4 == 0:
            self.backward(loss)
            self.step("other")


def test_what_follows_the_last_step_of_a_batch_is_not_taken_back_with_the_next_one(
    tmp_path: Path,
) -> None:
    before = Before()
    whole = skipping(tmp_path, TakesTurns, experiment="whole", callbacks={"before": before})
    whole.fit()
    assert whole.progress.num_skipped_steps == 1
    (statistics,) = (k for k in before.found[0] if k.endswith("other/0.running_mean"))
    found = [one[statistics] for one in before.found]
    assert len(set(found)) == len(found) == 6  # each batch adds to them, the skipped one as well
    skipping(tmp_path, TakesTurns, experiment="cut", max_steps=3).fit()
    cut = skipping(tmp_path, TakesTurns, experiment="cut")
    cut.fit()
    assert differences(exact_state(whole), exact_state(cut)) == []


@pytest.mark.distributed
@pytest.mark.parametrize("options", [{"dp_replicate": 2}, {"dp_shard": 2}], ids=str)
@pytest.mark.parametrize("what", ["input", "loss"])
def test_all_ranks_skip_what_one_of_them_has_met(
    tmp_path: Path, options: dict[str, Any], what: str
) -> None:
    def rank() -> Any:
        kind = type("Bad", (Normed,), {"what": what, "bad_rank": 1, "bad_batches": (1,)})
        trainer = skipping(tmp_path, kind, callbacks={"before": Before()}, **options)
        trainer.fit()
        before = trainer.callbacks["before"]
        changed = [bool(differences(*pair)) for pair in zip(before.found, before.left, strict=True)]
        # Each rank of a sharded model has running statistics of its own.
        shared = {name: one for name, one in weights(trainer).items() if "running" not in name}
        return changed, trainer.progress.num_skipped_steps, shared

    one, other = run_ranks(2, rank)
    assert one[:2] == ([True, False, True], 1)
    assert one == other


@pytest.mark.distributed
@pytest.mark.parametrize("options", [{"dp_replicate": 2}, {"dp_shard": 2}], ids=str)
@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_what_one_rank_has_met_ends_the_run_of_all(
    tmp_path: Path, options: dict[str, Any], policy: str
) -> None:
    def rank() -> str:
        kind = type("Bad", (Normed,), {"bad_rank": 1, "bad_batches": (1, 2)})
        trainer = skipping(tmp_path, kind, on_nonfinite=policy, max_skipped_in_a_row=1, **options)
        with pytest.raises(NonFiniteError) as caught:
            trainer.fit()
        assert not list((trainer.run_directory / "checkpoints").glob("step-*"))
        return str(caught.value)

    one, other = run_ranks(2, rank)
    assert one == other
    where = "step 2 (epoch 0, batch 1)" if policy == "raise" else "step 3 (epoch 0, batch 2)"
    assert where in one


def test_without_anything_to_skip_the_numbers_are_those_of_raise(tmp_path: Path) -> None:
    good = type("Good", (Normed,), {"bad_batches": ()})
    runs = [
        skipping(tmp_path, good, experiment=policy, on_nonfinite=policy, gradient_clip_val=0.5)
        for policy in ("raise", "skip")
    ]
    for run in runs:
        run.fit()
    assert differences(*map(exact_state, runs)) == []


def test_other_policies_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"on_nonfinite='ignore' is neither 'raise' nor 'skip'"):
        tiny(tmp_path, on_nonfinite="ignore")
    with pytest.raises(ConfigError, match=r"max_skipped_in_a_row=0"):
        tiny(tmp_path, max_skipped_in_a_row=0)
