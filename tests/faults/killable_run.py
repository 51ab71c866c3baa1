"""A training run of six to eight optimizer steps that kills itself with SIGKILL.

    python killable_run.py ROOT EXPERIMENT CELL NUM_WORKERS MOMENT

``CELL`` is a name in ``CELLS``; ``MOMENT`` is explained in kill_moments.py, and empty for a run
that is left alone. Beside its directory the run writes

    EXPERIMENT.starts       the step at which each process of it started to train
    EXPERIMENT.killed       where in the code it was killed
    EXPERIMENT.end-RANK     at its end: all of its state, by path
    EXPERIMENT.marks-RANK   at its end: how often MOMENT was reached, by the end of each save (if
                            it is in-save) and of the run
"""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path
from typing import Any

import kill_moments
import torch
from layouts import LAYOUTS, Blocks, split_blocks
from support import TinyTrainer, exact_state, mlp, tiny
from torch import Tensor, nn
from torchmetrics import MeanMetric

from dream_trainer.callbacks import Callback

#: Samples of an epoch for each rank: the last batch is a short one, and in "dropout" and "both"
#: the last accumulation window too; on several ranks some have no sample left for that batch.
CELLS: dict[str, dict[str, Any]] = {
    "plain": {"samples": 14, "gradient_accumulation_steps": 1},
    "dropout": {"samples": 17, "gradient_accumulation_steps": 2, "dropout": 0.3},
    "augmentation": {"samples": 14, "gradient_accumulation_steps": 1, "augment": True},
    "both": {"samples": 17, "gradient_accumulation_steps": 2, "dropout": 0.3, "augment": True},
}
#: Optimizer steps of a run.
STEPS = {"plain": 8, "dropout": 6, "augmentation": 8, "both": 6}


class Net(nn.Module):
    """With a buffer that every forward changes, as batch norm has."""

    mean: Tensor

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.body = mlp(dropout)
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.mean.lerp_(x.mean(), 0.1)
        result: Tensor = self.body(x) + self.mean
        return result


class Run(TinyTrainer):
    def configure_models(self) -> None:
        self.net = Net(self.config.dropout)

    def configure_metrics(self) -> None:
        self.error = MeanMetric()

    def compute_loss(self, batch: Any, batch_idx: int) -> Any:
        loss = super().compute_loss(batch, batch_idx)
        self.error.update(loss)
        return loss


class Split(Run):
    """A net that every layout can split and shard."""

    def configure_models(self) -> None:
        self.net = Blocks(dropout=self.config.dropout)

    def apply_tensor_parallel(self, model: nn.Module, mesh: Any) -> None:
        split_blocks(model, mesh)


class Starts(Callback):
    def __init__(self, path: Path) -> None:
        self._path = path

    def pre_fit(self, trainer: Any) -> None:
        if trainer.world.is_global_zero:
            with self._path.open("a") as file:
                file.write(f"{trainer.global_step}\n")


def run(
    root: str | Path,
    experiment: str,
    cell: str = "both",
    num_workers: int = 0,
    moment: str = "",
    kind: type[Run] = Run,
    layout: str = "ddp",
) -> None:
    """Train to the end, or to the moment."""
    root = Path(root)
    options = dict(CELLS[cell])
    if layout != "ddp":
        options |= {"devices": LAYOUTS[layout].size, "dp_replicate": 1, **LAYOUTS[layout].sizes}
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    callbacks: dict[str, Callback] = {"starts": Starts(root / f"{experiment}.starts")}
    trigger = None
    if moment:
        trigger, traps = kill_moments.arm(
            moment, directory(root, experiment), root / f"{experiment}.killed"
        )
        callbacks |= traps
    trainer = tiny(
        root,
        kind,
        experiment=experiment,
        num_workers=num_workers,
        callbacks=callbacks,
        n_epochs=2,
        num_samples=options.pop("samples") * world_size + world_size // 2,
        num_val_samples=6,
        gradient_clip_val=0.5,
        val_every_n_steps=2,
        every_n_steps=1,
        keep_last=2,
        monitor="val/loss",
        **options,
    )
    trainer.fit()
    if trigger is not None:
        trigger.end()
        marks = root / f"{experiment}.marks-{trainer.world.rank}"
        marks.write_text("\n".join(map(str, trigger.marks)))
    end = root / f"{experiment}.end-{trainer.world.rank}"
    end.write_bytes(pickle.dumps(exact_state(trainer)))


def directory(root: Path, experiment: str) -> Path:
    return root / "default" / "default" / experiment


if __name__ == "__main__":
    root, experiment, cell, num_workers, moment = sys.argv[1:]
    run(root, experiment, cell, int(num_workers), moment)
