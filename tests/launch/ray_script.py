"""A user's script: Ray Train runs the trainer on two workers, one of which is killed once."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import ray
import train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer


def train_loop_per_worker(config: dict[str, Any]) -> None:
    os.environ["DIE"] = config["die"]
    train.Trainer(train.config(Path(config["folder"]))).fit()


if __name__ == "__main__":
    folder, die = sys.argv[1:]
    ray.init(num_cpus=3, include_dashboard=False, object_store_memory=100 * 1024**2)
    try:
        TorchTrainer(
            train_loop_per_worker,
            train_loop_config={"folder": folder, "die": die},
            scaling_config=ScalingConfig(num_workers=2),
            run_config=RunConfig(
                storage_path=f"{folder}/ray", failure_config=FailureConfig(max_failures=1)
            ),
        ).fit()
    finally:
        ray.shutdown()
