"""Every layout follows the same loss curve, goes on to the bit, and loads every other's state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import LAYOUTS, Blocks, BlocksTrainer, in_double, laid_out
from support import differences, exact_state, flat, run_ranks
from torch import Tensor, nn

from dream_trainer.callbacks import Callback

pytestmark = [pytest.mark.distributed, pytest.mark.may_leave("rng")]

#: Two batches a step; the last window of each epoch is short and uneven, 8 + 3 samples, so that
#: one rank of four has none.
HARD: dict[str, Any] = {
    "samples_per_batch": 8,
    "global_batch_size": 16,
    "num_samples": 75,
    "gradient_clip_val": 0.3,
    "n_epochs": None,
    "val_every_n_epochs": 5,
}
#: In the third epoch, inside an accumulation window: 12 steps are taken.
BATCHES_AT_SAVE, STEPS_AT_SAVE = 25, 12
NUM_STEPS = 50
MAX_STEPS = {"float64": NUM_STEPS, "float32": 8, "bfloat16": 8}


class Net(Blocks):
    """With buffers that change, a weight used twice, and a part that is not trained."""

    anchor: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = (nn.Linear(8, 8, bias=False) for _ in range(2))
        self.outer.weight = self.inner.weight
        self.fixed = nn.Linear(8, 8).requires_grad_(False)
        self.batch_norm = nn.BatchNorm1d(3)
        self.register_buffer("anchor", torch.randn(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        # Statistics of samples would differ with the number of ranks; these do not.
        x = self.embed(x + self.batch_norm(self.anchor)[0])
        for block in self.blocks:
            x = block(x)
        return self.head(self.outer(self.fixed(self.inner(x)).tanh()))


class Hard(BlocksTrainer):
    """Two optimizers on one model, AdamW with two groups and SGD with momentum; two schedules."""

    def configure_models(self) -> None:
        self.net = Net()

    def configure_optimizers(self) -> Any:
        matrices = [p for p in self.net.blocks.parameters() if p.ndim > 1]
        vectors = [p for p in self.net.blocks.parameters() if p.ndim == 1]
        inside = {id(p) for p in self.net.blocks.parameters()}
        rest = [p for p in self.net.parameters() if p.requires_grad and id(p) not in inside]
        groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0, "lr": 0.01}]
        return {
            "adam": torch.optim.AdamW(groups, lr=0.02, foreach=True),
            "sgd": torch.optim.SGD(rest, lr=0.02, momentum=0.9, foreach=True),
        }

    def configure_schedulers(self) -> Any:
        adam, sgd = self.named_optimizers().values()
        step, cosine = torch.optim.lr_scheduler.StepLR, torch.optim.lr_scheduler.CosineAnnealingLR
        return [step(adam, 7, 0.7), cosine(sgd, NUM_STEPS)]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        values = self.compute_loss(batch, batch_idx)
        self.backward(values["loss"], values["weight"])
        norms = {f"{name}_norm": self.step(name) for name in self.named_optimizers()}
        return values | {name: norm for name, norm in norms.items() if norm is not None}


class Watch(Callback):
    """Saves inside a window, and keeps the exact state a little later."""

    def __init__(self, path: Path | None, steps: int) -> None:
        self.path, self.steps = path, steps
        self.state: dict[str, Any] = {}
        self.saved: dict[str, Any] = {}

    def post_train_step(self, trainer: Any, *_: Any) -> None:
        if self.path is not None and trainer.progress.num_batches == BATCHES_AT_SAVE:
            assert trainer.is_accumulating_gradients
            trainer.save_checkpoint(self.path)
            self.saved = portable(trainer)

    def on_boundary(self, trainer: Any) -> None:
        if trainer.global_step == self.steps and not self.state:
            self.state = exact_state(trainer)


@dataclass
class Outcome:
    """Of one rank."""

    rows: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    saved: dict[str, Any] = field(default_factory=dict)
    differences: list[str] = field(default_factory=list)


def portable(trainer: Any) -> dict[str, Any]:
    """What belongs to no rank, and to no place in a window."""
    state = trainer.state_dict()
    return flat({part: state[part] for part in ("models", "optimizers", "schedulers")})


def straight(root: Path, layout: str) -> Outcome:
    """Train without a break, in all precisions; then again from the middle of a window."""
    outcome = Outcome()
    for dtype in ("float32", "bfloat16"):
        options = HARD | {"precision": "bf16-mixed" if dtype == "bfloat16" else "32-true"}
        trainer = laid_out(root, layout, max_steps=MAX_STEPS[dtype], **options)
        trainer.fit()
        outcome.rows[dtype] = trainer.logger.rows
    in_double()
    watch = Watch(root / layout, STEPS_AT_SAVE + 3)
    trainer = laid_out(root, layout, Hard, max_steps=NUM_STEPS, callbacks={"w": watch}, **HARD)
    trainer.fit()
    outcome.rows["float64"], outcome.saved = trainer.logger.rows, watch.saved
    again = Watch(None, watch.steps)
    other = laid_out(root, layout, Hard, max_steps=watch.steps, callbacks={"w": again}, **HARD)
    other.load_checkpoint(root / layout)
    other.fit()
    outcome.differences = differences(watch.state, again.state)
    return outcome


def moved(root: Path, layout: str) -> dict[str, tuple[dict[str, Any], list[dict[str, float]]]]:
    """By source: the state as it was loaded from there, and how it went on."""
    in_double()
    results = {}
    # One trainer for all: what it did before must not show, either.
    trainer = laid_out(root, layout, Hard, max_steps=STEPS_AT_SAVE + 2, **HARD)
    for source in LAYOUTS:
        trainer.load_checkpoint(root / source)
        loaded = portable(trainer)
        trainer.logger.rows = []
        trainer.fit()
        results[source] = (loaded, trainer.logger.rows)
    return results


def losses(rows: list[dict[str, float]]) -> list[float]:
    return [row["train/loss"] for row in rows if "train/loss" in row]


Runs = Callable[[str], list[Outcome]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("same-numbers")


@pytest.fixture(scope="module")
def runs(root: Path) -> Runs:
    """The straight run of a layout, made once; every check of this file is about it."""
    return cache(lambda layout: run_ranks(LAYOUTS[layout].size, straight, root, layout))


def largest_difference(one: list[dict[str, float]], other: list[dict[str, float]]) -> float:
    """Of all values of all rows, relative; names and steps must be equal."""
    assert [list(row) for row in one] == [list(row) for row in other]
    pairs = [(a[name], b[name]) for a, b in zip(one, other, strict=True) for name in a]
    return max(abs(a - b) / max(abs(a), abs(b), 1e-300) for a, b in pairs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fifty_steps_in_float64_are_the_same(runs: Runs, layout: str) -> None:
    single, here = (runs(name)[0].rows["float64"] for name in ("single", layout))
    steps = [row for row in here if "train/loss" in row]
    assert [row["step"] for row in steps] == list(range(1, NUM_STEPS + 1))
    norms = [row[name] for row in steps for name in ("train/adam_norm", "train/sgd_norm")]
    assert min(norms) < HARD["gradient_clip_val"] < max(norms)  # some are clipped, some are not
    assert largest_difference(single, here) < 1e-10


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rounding_alone_keeps_curves_apart(runs: Runs, layout: str, dtype: str) -> None:
    """Samples are added up in another order, so each sum is rounded differently.

    The first loss comes from equal weights: a few units in the last place. After that AdamW
    divides each gradient by its own size, so that a weight whose gradient is mostly rounding moves
    by the learning rate all the same: the distance may grow by some units with every step. It grows
    more units in float32, whose units are small beside such moves. A sample lost or counted twice
    is a distance of percents from the first step on.
    """
    curves = [losses(runs(name)[0].rows[dtype]) for name in ("single", layout)]
    unit = torch.finfo(getattr(torch, dtype)).eps
    growth = {"float32": 64, "bfloat16": 2}[dtype]
    for step, (one, other) in enumerate(zip(*curves, strict=True)):
        assert abs(one - other) <= (2 + growth * step) * unit * abs(one), step
    # That the low precision is there in the first place.
    in_full = losses(runs(layout)[0].rows["float32"])
    assert (abs(in_full[0] - curves[1][0]) > 1e-5 * in_full[0]) == (dtype == "bfloat16")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_goes_on_to_the_bit_from_inside_a_window(runs: Runs, layout: str) -> None:
    assert [outcome.differences for outcome in runs(layout)] == [[]] * LAYOUTS[layout].size


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_of_any_layout_goes_on_under_this_one(
    root: Path, runs: Runs, layout: str
) -> None:
    saved = {source: runs(source)[0].saved for source in LAYOUTS}
    straight = runs(layout)[0].rows["float64"]
    never_moved = [row for row in straight if "train/loss" in row][STEPS_AT_SAVE:][:2]
    ranks = run_ranks(LAYOUTS[layout].size, moved, root, layout)
    for rank in ranks:
        for source, (loaded, _) in rank.items():
            assert differences(saved[source], loaded) == [], source
    for source, (_, went_on) in ranks[0].items():
        assert largest_difference(never_moved, went_on) < 1e-10, source
