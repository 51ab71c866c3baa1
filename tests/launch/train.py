"""A tiny run as a user's script; `launched.py` starts it in every way there is."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support import TinyConfig, TinyTrainer, digest

from dream_trainer.cli import DreamCLI
from dream_trainer.configs import CheckpointParameters, DeviceParameters, TrainingParameters

STEPS = 8


@dataclass(kw_only=True)
class Config(TinyConfig):
    experiment: str | None = None
    seed: int | None = None
    num_samples: int = 32
    batch_size: int = 2
    dropout: float = 0.2
    ends: str = "."


class Trainer(TinyTrainer):
    """Writes down how each of its ranks ended.

    ``DIE=rank:step`` is SIGKILL, once in the life of the job, before that step is saved;
    ``DIE_OF=SIGTERM`` another signal, and ``DIE_WITH=parent`` one to the launcher.
    """

    config: Config

    def step(self, *arguments: Any) -> Any:
        norm = super().step(*arguments)
        rank, step = (int(part) for part in os.environ.get("DIE", "-1:-1").split(":"))
        marker = Path(self.config.ends) / "died"
        if (self.world.rank, self.global_step) == (rank, step) and not marker.exists():
            marker.touch()
            pid = os.getppid() if os.environ.get("DIE_WITH") == "parent" else os.getpid()
            os.kill(pid, signal.Signals[os.environ.get("DIE_OF", "SIGKILL")])
        return norm

    def fit(self) -> None:
        super().fit()
        world = self.world
        end = {
            "rank": world.rank,
            "local_rank": world.local_rank,
            "node_rank": world.node_rank,
            "size": world.size,
            "num_nodes": getattr(world.strategy, "num_nodes", 1),
            "environment": type(getattr(world.strategy, "cluster_environment", None)).__name__,
            "strategy": type(world.strategy).__name__,
            "precision": world.precision,
            "experiment": self.config.experiment,
            "seed": self.config.seed,
            "step": self.global_step,
            "resumed": self.is_resumed,
            "digest": digest(self),
            "weights": [float(x) for p in self.net.parameters() for x in p.detach().view(-1)],
        }
        path = Path(self.config.ends) / f"end-{world.rank}.json"
        path.with_suffix(".tmp").write_text(json.dumps(end))
        path.with_suffix(".tmp").rename(path)


def config(folder: Path, **options: Any) -> Config:
    """Two epochs of four steps, a checkpoint after each step that is whole when the step ends."""
    parts: dict[str, Any] = {
        "training_parameters": {"n_epochs": 2, "global_batch_size": 8},
        "checkpoint_parameters": {"every_n_steps": 1, "async_save": False},
        "device_parameters": {"accelerator": "cpu"},
    }
    kinds = {
        "training_parameters": TrainingParameters,
        "checkpoint_parameters": CheckpointParameters,
        "device_parameters": DeviceParameters,
    }
    made = {name: kinds[name](**parts[name] | options.pop(name, {})) for name in kinds}
    place = {"root_dir": str(folder / "runs"), "ends": str(folder)}
    return Config(**{"seed": 3, "callbacks": {"progress": None}} | place | made | options)


if __name__ == "__main__":
    DreamCLI(Trainer)
