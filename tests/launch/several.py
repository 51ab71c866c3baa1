"""Runs one after another in a process, without names, as cross-validation has them."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist
import train


def run(*, closes: bool) -> str:
    trainer = train.Trainer(train.config(Path.cwd(), seed=None))
    trainer.fit()
    assert (trainer.global_step, trainer.is_resumed) == (train.STEPS, False)
    name, world = trainer.config.experiment, trainer.world
    assert name is not None
    del trainer  # its model, which the group must not outlive
    if closes:
        world.close()
    assert dist.is_initialized() != closes
    return name


if __name__ == "__main__":
    names = [run(closes=True), run(closes=True), run(closes=False), run(closes=False)]
    if dist.get_rank() == 0:
        print("names", *names)
