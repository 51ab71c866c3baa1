"""The pictures of docs/steering.md: rates and losses that real runs wrote into their logs."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot as plt
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, TensorDataset

from dream_trainer import (
    CheckpointParameters,
    DeviceParameters,
    DreamTrainer,
    DreamTrainerConfig,
    EarlyStopping,
    Schedule,
    TrainingParameters,
    warm_up,
)
from dream_trainer.schedules import cosine, inverse_square_root, linear, warm_up_stable_decay

_INK, _GRID = "#333333", "#dddddd"
_COLOURS = ("#3366cc", "#cc5533", "#339966", "#8855bb")
_STEPS = 200
_NOISE = 0.5


class Curve(DreamTrainer):
    """A network that is too large for few noisy points: it learns them by heart in the end."""

    schedule: Callable[[Any, int], Any]

    def configure_models(self) -> None:
        self.model = nn.Sequential(
            nn.Linear(1, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 1)
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), lr=1e-2, weight_decay=0.0)

    def configure_schedulers(self) -> Any:
        (optimizer,) = self.named_optimizers().values()
        return self.schedule(optimizer, _STEPS)

    def configure_dataloaders(self) -> Any:
        x = torch.linspace(-2, 2, 60).unsqueeze(1)
        y = torch.sin(3 * x) + _NOISE * torch.randn(60, 1)
        train, val = TensorDataset(x[::2], y[::2]), TensorDataset(x[1::2], y[1::2])
        return DataLoader(train, batch_size=10, shuffle=True), DataLoader(val, batch_size=40)

    def compute_loss(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.model(x), y)


def rows_of(
    root: Path, name: str, schedule: Callable[[Any, int], Any], **options: Any
) -> list[dict[str, float]]:
    """The log of a run."""
    kind = type("Curve", (Curve,), {"schedule": staticmethod(schedule)})
    callbacks = {"progress": None} | options.pop("callbacks", {})
    config = DreamTrainerConfig(
        root_dir=str(root),
        experiment=name,
        device_parameters=DeviceParameters.SINGLE_DEVICE(accelerator="cpu"),
        training_parameters=TrainingParameters(**options),
        checkpoint_parameters=CheckpointParameters(every_n_epochs=None),
        callbacks=callbacks,
    )
    trainer = kind(config)
    trainer.fit()
    log = (trainer.run_directory / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in log.splitlines()]


def plateau(optimizer: Any, steps: int) -> Any:
    """Halves the rate when the loss of 4 epochs is no better."""
    looks = ReduceLROnPlateau(optimizer, factor=0.5, patience=3, threshold=0.02)
    return warm_up(Schedule(looks, every="validation", monitor="val/loss"), 20)


#: Panel -> name -> what configure_schedulers makes.
_SHAPES: dict[str, dict[str, Callable[[Any, int], Any]]] = {
    "shapes": {
        "cosine": lambda o, n: cosine(o, n, warm_up=20),
        "linear": lambda o, n: linear(o, n, warm_up=20),
        "warm_up_stable_decay": lambda o, n: warm_up_stable_decay(o, n, warm_up=20, decay=60),
        "inverse_square_root": lambda o, _: inverse_square_root(o, warm_up=20),
    },
    "warm_up(..., 20) on top of another schedule": {
        "StepLR, every 10 epochs": lambda o, _: warm_up(
            Schedule(StepLR(o, 10, 0.5), every="epoch"), 20
        ),
        "ReduceLROnPlateau, by validation": plateau,
        "the optimizer alone": lambda o, _: warm_up(o, 20),
    },
}


def learning_rates(root: Path, path: Path) -> None:
    """The rate that each step used."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.4), sharey=True)
    for panel, (title, shapes) in zip(panels, _SHAPES.items(), strict=True):
        for colour, (name, schedule) in zip(_COLOURS, shapes.items(), strict=False):
            log = rows_of(root, name.replace(" ", "-"), schedule, max_steps=_STEPS)
            rates = [row["lr/model"] for row in log if "lr/model" in row]
            panel.plot(range(1, len(rates) + 1), rates, color=colour, label=name, linewidth=1.8)
        _dress(panel, "step", title)
    panels[0].set_ylabel("learning rate")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def early_stopping(root: Path, path: Path) -> None:
    """Where a run ended, and what would have come."""

    def constant(optimizer: Any, _: int) -> None:
        return None

    stopping = EarlyStopping("val/loss", patience=8)
    stopped = rows_of(root, "stopped", constant, n_epochs=80, callbacks={"stopping": stopping})
    whole = rows_of(root, "whole", constant, n_epochs=80)
    figure, panel = plt.subplots(figsize=(7, 3.4))
    found = {
        name: [r["val/loss"] for r in log if "val/loss" in r]
        for name, log in {"stopped": stopped, "whole": whole}.items()
    }
    ended, best = len(found["stopped"]), found["stopped"].index(min(found["stopped"])) + 1
    panel.plot(
        range(1, 81),
        found["whole"],
        color="#bbbbbb",
        linewidth=1.4,
        label="validation loss without it",
    )
    panel.plot(
        range(1, ended + 1),
        found["stopped"],
        color=_COLOURS[0],
        linewidth=2,
        label="validation loss",
    )
    panel.axvline(ended, color=_INK, linewidth=0.9, linestyle=":")
    panel.plot([best], [min(found["stopped"])], "o", color=_COLOURS[1], label=f"best, epoch {best}")
    panel.annotate(
        f"stopped after epoch {ended}:\npatience=8",
        (ended, panel.get_ylim()[1] * 0.9),
        xytext=(6, 0),
        textcoords="offset points",
        color=_INK,
        fontsize=9,
        va="top",
    )
    _dress(panel, "epoch", None)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _dress(panel: Any, what: str, title: str | None) -> None:
    panel.set_xlabel(what)
    panel.grid(color=_GRID, linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, fontsize=8)
    if title is not None:
        panel.set_title(title, fontsize=10, color=_INK)
    panel.set_ylim(bottom=0)


def main(folder: Path) -> None:
    """Write ``learning_rates.png`` and ``early_stopping.png``.

    Args:
        folder: which is there.
    """
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        learning_rates(Path(root), folder / "learning_rates.png")
        early_stopping(Path(root), folder / "early_stopping.png")
