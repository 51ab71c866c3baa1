"""Whatever comes in the box resumes exactly: killed after every step, and compared to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import Points, TinyTrainer, tiny_config
from torch import nn
from torch.optim.lr_scheduler import ExponentialLR, ReduceLROnPlateau
from torch.utils.data import DataLoader

from dream_trainer import (
    EMA,
    SWA,
    Callback,
    EarlyStopping,
    GarbageCollection,
    GradientAccumulationScheduler,
    GradNormMonitor,
    Histograms,
    MemoryMonitor,
    Profiler,
    ProgressBar,
    RunSummary,
    Schedule,
    StepTimes,
    Throughput,
    Unfreeze,
    Unfreezing,
    verify_resume,
    warm_up,
)


def with_callback(callback: Callback) -> dict[str, Any]:
    return {"callbacks": {"feature": callback}}


class Board:
    """A logger that takes histograms, and keeps none."""

    experiment = property(lambda self: self)

    def add_histogram_raw(self, name: str, **told: Any) -> None:
        pass

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        pass

    def finalize(self, status: str) -> None:
        pass


class WithBoard(TinyTrainer):
    """Verification leaves out the loggers of a configuration."""

    def __init__(self, config: Any, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        self.loggers["board"] = Board()


class Reducing(TinyTrainer):
    """Logs a sum, a maximum, a minimum and a weighted mean, in steps and in validations."""

    def compute_loss(self, batch: Any, batch_idx: int) -> Any:
        phase, x = "train" if self.net.training else "val", batch["x"]
        for reduce in ("sum", "max", "min"):
            self.log(f"{phase}/{reduce}", x.sum(), reduce=reduce)
        self.log(f"{phase}/weighted", x.mean(), weight=len(x))
        return super().compute_loss(batch, batch_idx)


class LooksAtBest(Callback):
    """Tests the best checkpoint, and the live weights, at the end of every epoch but the first."""

    def __init__(self) -> None:
        self.results: list[float] = []

    def post_epoch(self, trainer: Any) -> None:
        if trainer.current_epoch:
            points = DataLoader(Points(6, seed=7), batch_size=4)
            for checkpoint in ("best", None):
                self.results += trainer.test(points, checkpoint=checkpoint).values()

    def state_dict(self) -> dict[str, Any]:
        return {"results": list(self.results)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.results = list(state["results"])


def looking_at_best() -> tuple[type[TinyTrainer], dict[str, Any]]:
    monitored = {"monitor": "val/loss", "keep_top_k": 2}
    return TinyTrainer, {"callbacks": {"tests": LooksAtBest()}, **monitored}


class Normed(TinyTrainer):
    """With batch norm, whose statistics are buffers."""

    def configure_models(self) -> None:
        self.net = nn.Sequential(
            nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 1)
        )


class Diverges(TinyTrainer):
    def compute_loss(self, batch: Any, batch_idx: int) -> Any:
        loss = super().compute_loss(batch, batch_idx)
        return loss * float("nan") if batch_idx == 1 and torch.is_grad_enabled() else loss


def skips_every_third_step() -> tuple[type[TinyTrainer], dict[str, Any]]:
    return Diverges, {"on_nonfinite": "skip"}


def averages_exponentially() -> tuple[type[TinyTrainer], dict[str, Any]]:
    ema = EMA(0.9, every_n_steps=2, start_step=2, warm_up=True, average_buffers=True)
    return Normed, {"callbacks": {"ema": ema}}


def averages_late_weights() -> tuple[type[TinyTrainer], dict[str, Any]]:
    swa = SWA(start_epoch=1, every=1, learning_rate=0.01, anneal_steps=2)
    return Normed, {"callbacks": {"swa": swa}}


def says_all_that_it_can() -> tuple[type[TinyTrainer], dict[str, Any]]:
    # By names of their own: verify_resume leaves out those that every run has.
    bars, told = ProgressBar(metrics=["*"], seconds_per_line=0.0), RunSummary(min_steps=0)
    return TinyTrainer, {"callbacks": {"bars": bars, "told": told}}


class AtOnce(Normed):
    """Steps that are left out, a plateau under a warm-up, and averages that begin late."""

    def configure_schedulers(self) -> Any:
        (optimizer,) = self.named_optimizers().values()
        plateau = ReduceLROnPlateau(optimizer, patience=0, threshold=0.5)
        return warm_up(Schedule(plateau, every="validation", monitor="val/loss"), 4)

    def compute_loss(self, batch: Any, batch_idx: int) -> Any:
        loss = super().compute_loss(batch, batch_idx)
        return loss * float("nan") if batch_idx == 2 and torch.is_grad_enabled() else loss


def all_at_once() -> tuple[type[TinyTrainer], dict[str, Any]]:
    callbacks: dict[str, Any] = {
        "ema": EMA(0.9, every_n_steps=2, start_step=1, average_buffers=True),
        "swa": SWA(start_epoch=1, learning_rate=0.01, anneal_steps=2, evaluate_with="model"),
        "unfreeze": Unfreeze({"net.0": Unfreezing(step=3, lr_scale=0.1, eval_mode=True)}),
        "accumulation": GradientAccumulationScheduler({0: 3, 1: 2, 2: 1}),
        "stopping": EarlyStopping(patience=30),
        "times": StepTimes(),
        "tests": LooksAtBest(),
    }
    options = {"on_nonfinite": "skip", "val_every_n_steps": 1, "num_samples": 19}
    return AtOnce, {"callbacks": callbacks, "monitor": "val/loss", "keep_top_k": 2, **options}


#: Feature -> (trainer class, options of `tiny_config`).
FEATURES: dict[str, Callable[[], tuple[type[TinyTrainer], dict[str, Any]]]] = {
    "none": lambda: (TinyTrainer, {}),
    "all at once": all_at_once,
    "averages: EMA": averages_exponentially,
    "averages: SWA": averages_late_weights,
    "display": says_all_that_it_can,
    "log: reductions, gradient norms, throughput, memory": lambda: (
        Reducing,
        {
            "gradient_accumulation_steps": 2,
            "track_grad_norm": True,
            "callbacks": {
                "norms": GradNormMonitor(every_n_steps=2),
                "rate": Throughput(peak_flops=1e9),
                "memory": MemoryMonitor(),
            },
        },
    ),
    "on_nonfinite": skips_every_third_step,
    "garbage collection": lambda: (TinyTrainer, with_callback(GarbageCollection(every_n_steps=2))),
    "histograms": lambda: (WithBoard, with_callback(Histograms(2, parameters=True))),
    "profiler": lambda: (
        TinyTrainer,
        with_callback(Profiler(at_steps=[3], warmup=1, active=1)),
    ),
    "step times": lambda: (TinyTrainer, with_callback(StepTimes())),
    # steering
    "early stopping": lambda: (
        TinyTrainer,
        {
            "callbacks": {
                "by_validation": EarlyStopping(patience=2),
                "by_training": EarlyStopping("train/loss"),
            },
            "gradient_accumulation_steps": 2,
        },
    ),
    "accumulation by epoch": lambda: (
        TinyTrainer,
        {"callbacks": {"by_epoch": GradientAccumulationScheduler({0: 3, 1: 2, 2: 1})}},
    ),
    "schedule by epoch": lambda: (
        Scheduled.by(lambda o: Schedule(ExponentialLR(o, 0.5), every="epoch", frequency=2)),
        {"train_steps_per_epoch": 1},
    ),
    "plateau under a warm-up": lambda: (
        Scheduled.by(
            lambda o: warm_up(
                Schedule(
                    ReduceLROnPlateau(o, patience=0, threshold=0.5),
                    every="validation",
                    monitor="val/loss",
                ),
                4,
            )
        ),
        {"val_every_n_steps": 1},
    ),
    "unfreezing": lambda: (
        TinyTrainer,
        {
            "callbacks": {"unfreeze": Unfreeze({"net.0": Unfreezing(step=3, lr_scale=0.1)})},
            "save_frozen": False,
        },
    ),
    "tests on the best checkpoint in the middle": looking_at_best,
}


class Scheduled(TinyTrainer):
    """With the scheduler that a function makes."""

    make: Callable[[Any], Any]

    @classmethod
    def by(cls, make: Callable[[Any], Any]) -> type[TinyTrainer]:
        return type("Scheduled", (cls,), {"make": staticmethod(make)})

    def configure_schedulers(self) -> Any:
        (optimizer,) = self.named_optimizers().values()
        return self.make(optimizer)


@pytest.mark.parametrize("feature", FEATURES)
def test_a_run_with_it_resumes_exactly(feature: str, tmp_path: Path) -> None:
    kind, options = FEATURES[feature]()
    whole = {"n_epochs": 3, "num_samples": 12, "dropout": 0.2, "augment": True} | options
    seen = ["trainer.seen*"]  # a list of what this process saw
    report = verify_resume(kind, tiny_config(tmp_path, **whole), steps=6, ignore=seen, tell=None)
    assert report.is_exact, report
