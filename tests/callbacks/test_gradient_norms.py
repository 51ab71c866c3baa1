"""Norms of gradients by layer: those of the whole gradients, under every layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import TinyTrainer, run_ranks, tiny

from dream_trainer import GradNormMonitor
from dream_trainer.callbacks.callback import Callback
from dream_trainer.errors import ConfigError

pytestmark = pytest.mark.may_leave("rng")


class Expected(Callback):
    """Norms taken by hand of the first step's gradients."""

    def pre_optimizer_step(self, trainer: Any, optimizer: Any) -> None:
        norms: dict[str, list[torch.Tensor]] = {}
        for path, parameter in trainer.net.named_parameters():
            gradient = parameter.grad
            gradient = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
            layer = path.split(".")[-2]
            norms.setdefault(layer, []).append(gradient.flatten())
        for layer, parts in norms.items():
            trainer.log(f"expected/net.{layer}", torch.cat(parts).norm())


def rows(root: Path, **options: Any) -> list[dict[str, Any]]:
    callbacks = {"norms": options.pop("monitor", GradNormMonitor()), "expected": Expected()}
    trainer = tiny(root, callbacks=callbacks, max_steps=4, has_validation=False, **options)
    trainer.fit()
    text = (trainer.run_directory / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def assert_as_expected(found: list[dict[str, Any]]) -> None:
    assert len(found) == 4
    for row in found:
        for layer in ("net.0", "net.3"):
            assert row[f"grad_norm/{layer}"] == pytest.approx(row[f"expected/{layer}"], rel=1e-5)
        together = (row["grad_norm/net.0"] ** 2 + row["grad_norm/net.3"] ** 2) ** 0.5
        assert row["train/grad_norm"] == pytest.approx(together, rel=1e-5)


def test_layers_have_the_norms_of_their_gradients_before_clipping(tmp_path: Path) -> None:
    assert_as_expected(rows(tmp_path, gradient_clip_val=0.01, gradient_accumulation_steps=2))


@pytest.mark.distributed
@pytest.mark.parametrize("sharded", [False, True])
def test_norms_are_those_of_whole_gradients_on_ranks(tmp_path: Path, sharded: bool) -> None:
    layout = {"dp_shard": 2, "dp_replicate": 1} if sharded else {}
    assert_as_expected(run_ranks(2, lambda: rows(tmp_path, track_grad_norm=True, **layout))[0])


def test_depth_joins_layers_and_steps_are_thinned(tmp_path: Path) -> None:
    monitor = GradNormMonitor(depth=0, every_n_steps=2)
    found = rows(tmp_path, monitor=monitor, track_grad_norm=True)
    logged = {row["step"]: row.get("grad_norm/net") for row in found}
    assert [step for step, norm in logged.items() if norm is not None] == [2, 4]
    for row in found[1::2]:
        assert row["grad_norm/net"] == pytest.approx(row["train/grad_norm"], rel=1e-5)


class ByHand(TinyTrainer):
    """A step written by hand logs the norm that `step` returns."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.compute_loss(batch, batch_idx)
        self.backward(loss)
        norm = self.step()
        return {"loss": loss} if norm is None else {"loss": loss, "grad_norm": norm}


def test_both_kinds_of_steps_log_the_norm_that_is_tracked(tmp_path: Path) -> None:
    found = []
    for kind in (TinyTrainer, ByHand):
        trainer = tiny(tmp_path, kind, experiment=kind.__name__, track_grad_norm=True)
        trainer.fit()
        found.append((trainer.run_directory / "metrics.jsonl").read_text(encoding="utf-8"))
    assert '"train/grad_norm"' in found[0]
    assert found[0] == found[1]


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"(?s)depth=-1 is below 0.*every_n_steps=0 is not"):
        GradNormMonitor(depth=-1, every_n_steps=0)
