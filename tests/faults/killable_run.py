"""A training run that kills itself with SIGKILL at a chosen moment.

    python killable_run.py ROOT EXPERIMENT NUM_WORKERS MOMENT

``MOMENT`` is ``NAME:N`` or ``NAME:N:RANK``: the N-th time that a hook, or one of the moments
inside a save in ``INSIDE``, is reached; empty for a run that is left alone. At its end the run
writes a hash of its weights and optimizer state beside its directory.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support import TinyTrainer, digest, tiny
from torchmetrics import MeanMetric

from dream_trainer.callbacks import Callback
from dream_trainer.callbacks.callback import HOOKS

#: Moment -> (module, what to wrap, whether the call is still made).
INSIDE = {
    "before-files": ("dream_trainer.storage.directory", "write_tree", False),
    "after-files": ("dream_trainer.storage.directory", "write_tree", True),
    "after-manifest": ("dream_trainer.storage.manifest", "Manifest.write", True),
    "after-rename": ("dream_trainer.storage.directory", "fsync_directory", False),
    "before-delete": ("shutil", "rmtree", False),
    "after-delete": ("shutil", "rmtree", True),
    "before-log": ("dream_trainer.loggers.jsonl", "JsonlLog.write", False),
    "after-log": ("dream_trainer.loggers.jsonl", "JsonlLog.write", True),
    "after-cut": ("dream_trainer.loggers.jsonl", "JsonlLog.cut", True),
}


class Run(TinyTrainer):
    def configure_metrics(self) -> None:
        self.error = MeanMetric()

    def compute_loss(self, batch: Any, batch_idx: int) -> Any:
        loss = super().compute_loss(batch, batch_idx)
        self.error.update(loss)
        return loss


def killer(number: int, rank: int) -> Callable[[], None]:
    left = [number if int(os.environ.get("RANK", 0)) == rank else -1]

    def strike() -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    return strike


def arm(moment: str) -> dict[str, Callback]:
    """Callbacks to give to the run; moments inside a save are wrapped in place."""
    name, number, rank = [*moment.split(":"), "0"][:3]
    strike = killer(int(number), int(rank))
    if name in HOOKS:
        return {"kills": type("Kills", (Callback,), {name: lambda *_: strike()})()}
    module, path, is_called = INSIDE[name]
    *owners, attribute = path.split(".")
    owner: Any = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    original = getattr(owner, attribute)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if is_called:
            result = original(*args, **kwargs)
            strike()
            return result
        strike()
        return original(*args, **kwargs)

    setattr(owner, attribute, wrapped)
    return {}


def run(root: str | Path, experiment: str, num_workers: int = 0, moment: str = "") -> Any:
    trainer = tiny(
        root,
        Run,
        experiment=experiment,
        num_workers=num_workers,
        callbacks=arm(moment) if moment else {},
        n_epochs=2,
        num_samples=18,
        num_val_samples=6,
        gradient_accumulation_steps=2,
        val_every_n_steps=2,
        dropout=0.3,
        augment=True,
        every_n_steps=1,
        keep_last=2,
        monitor="val/loss",
    )
    trainer.fit()
    result = digest(trainer)
    if trainer.world.is_global_zero:
        (Path(root) / f"{experiment}.digest").write_text(result)
    return trainer


if __name__ == "__main__":
    root, experiment, num_workers, moment = sys.argv[1:]
    run(root, experiment, int(num_workers), moment)
