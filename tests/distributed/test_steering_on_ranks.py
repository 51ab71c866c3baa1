"""Early stopping, schedules, accumulation by epoch and unfreezing, on ranks as on one device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from layouts import LAYOUTS, BlocksTrainer, in_double, laid_out
from support import differences, exact_state, flat, run_ranks
from torch.optim.lr_scheduler import ReduceLROnPlateau

from dream_trainer import (
    EarlyStopping,
    GradientAccumulationScheduler,
    Schedule,
    Unfreeze,
    Unfreezing,
    warm_up,
)
from dream_trainer.world.wrappers import forward_module

pytestmark = [pytest.mark.distributed, pytest.mark.may_leave("rng")]

#: What every layout is to have, compared with one device.
CLOSE = {"rel": 1e-9, "abs": 1e-12}


class Steered(BlocksTrainer):
    """Everything at once: a plateau under a warm-up, parts that are unfrozen one by one."""

    def configure_schedulers(self) -> Any:
        (optimizer,) = self.named_optimizers().values()
        plateau = ReduceLROnPlateau(optimizer, patience=0, factor=0.5, threshold=0.3)
        return warm_up(Schedule(plateau, every="epoch", monitor="train/loss"), 4)


def callbacks() -> dict[str, Any]:
    return {
        "stopping": EarlyStopping("train/loss", patience=2, min_delta=0.2),
        "accumulation": GradientAccumulationScheduler({0: 3, 2: 1}),
        "unfreeze": Unfreeze(
            {
                "net.blocks.1": Unfreezing(step=2, lr_scale=0.5),
                "net.blocks.0": Unfreezing(epoch=2, lr_scale=0.25),
                "net.embed": Unfreezing(epoch=3, lr_scale=0.1),
            }
        ),
    }


def fit(root: Path, layout: str, experiment: str, **options: Any) -> Any:
    laid = LAYOUTS[layout]
    defaults = {
        "n_epochs": 9,
        "num_samples": 26,
        "enable": True,
        "gradient_clip_val": 0.5,
        "save_frozen": False,
        "experiment": experiment,
    }

    def rank() -> Any:
        in_double()
        trainer = laid_out(root, laid, Steered, callbacks=callbacks(), **defaults | options)
        trainer.fit()
        net = forward_module(trainer.sync_modules[0])
        unused = getattr(net, "find_unused_parameters", False)
        state = exact_state(trainer)
        shared = {k: v for k, v in state.items() if not k.startswith(("/rng", "/dataloaders"))}
        models = flat(trainer.state_dict()["models"])
        return trainer.stop_reason, trainer.global_step, unused, models, shared

    ranks = run_ranks(laid.size, rank)
    for stop_reason, step, unused, models, _ in ranks:
        assert (stop_reason, step, unused, models) == (*ranks[0][:2], False, ranks[0][3])
    return ranks


def log(root: Path, experiment: str) -> list[dict[str, float]]:
    path = root / "default" / "default" / experiment / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def on_one(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[dict[str, float]]]:
    root = tmp_path_factory.mktemp("one")
    (one,) = fit(root, "single", "single")
    return one, log(root, "single")


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_it_is_the_run_of_one_device_and_goes_on_exactly(
    tmp_path: Path, on_one: Any, layout: str
) -> None:
    (reason, steps, *_), expected = on_one
    assert reason.startswith("train/loss has not got ")
    assert {"lr/net/0", "lr/net/3", "train/grad_norm"} <= expected[0].keys()
    straight = fit(tmp_path, layout, "straight")
    assert straight[0][1] == steps
    rows = log(tmp_path, "straight")
    assert [row.keys() for row in rows] == [row.keys() for row in expected]
    for row, single in zip(rows, expected, strict=True):
        assert row == pytest.approx(single, **CLOSE), row["step"]
    # From before and from after parts are unfrozen, and in the middle of an epoch.
    for cut in (2, 12):
        fit(tmp_path, layout, f"cut-{cut}", max_steps=cut)
        again = fit(tmp_path, layout, f"cut-{cut}")
        for one, other in zip(straight, again, strict=True):
            assert differences(one[-1], other[-1]) == [], cut
        assert log(tmp_path, f"cut-{cut}") == rows


def test_a_checkpoint_of_two_ranks_goes_on_on_one_and_back(tmp_path: Path, on_one: Any) -> None:
    (reason, steps, *_), expected = on_one
    fit(tmp_path, "ddp", "moves", max_steps=4)
    fit(tmp_path, "fsdp", "moves", max_steps=12)
    fit(tmp_path, "single", "moves")
    rows = log(tmp_path, "moves")
    assert len(rows) == len(expected)
    for row, single in zip(rows, expected, strict=True):
        for one in (row, single):
            one.pop("train/index_sum", None)  # a metric counts on other ranks from there on
        assert row == pytest.approx(single, rel=1e-7), row["step"]
    for stop_reason, step, *_ in fit(tmp_path, "ddp", "moves"):  # it stays stopped
        assert (stop_reason[:20], step) == (reason[:20], steps)
