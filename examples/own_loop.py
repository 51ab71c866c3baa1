"""Handwritten digits in a loop of one's own on Fabric, exactly resumable by four lines.

    python examples/own_loop.py            # Ctrl-C or kill -9 it, and start it again

The lines that `ResumableRun` asks for end with `# (!)`; without them it is an ordinary script.
"""

from __future__ import annotations

import hashlib
import sys

import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dream_trainer import CheckpointParameters, ResumableRun  # (!)


def main(directory: str = "runs/own_loop", epochs: int = 20) -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    fabric.seed_everything(1)
    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / 16
    data = TensorDataset(images, torch.from_numpy(digits.target))
    train, test = torch.utils.data.random_split(data, [1_500, len(data) - 1_500])
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3), nn.LazyLinear(10)
    )
    model(images[:1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    model, optimizer = fabric.setup(model, optimizer)
    loader = fabric.setup_dataloaders(DataLoader(train, batch_size=32, shuffle=True))

    every = CheckpointParameters(every_n_steps=20)  # (!)
    named = {"model": model, "optimizer": optimizer, "schedule": schedule}
    run = ResumableRun(fabric, directory, checkpoints=every, **named)  # (!)
    for epoch in run.epochs(epochs):  # (!) instead of range(epochs)
        model.train()
        for x, y in run.batches(loader):  # (!) instead of loader
            loss = F.cross_entropy(model(x), y)
            fabric.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            run.log({"loss": loss})
        schedule.step()
        model.eval()
        with torch.no_grad():
            x, y = test[:]
            accuracy = (model(x).argmax(1) == y).float().mean()
        fabric.print(f"epoch {epoch}: loss {loss:.4f}, accuracy {accuracy:.4f}")
    weights = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
    fabric.print("weights", hashlib.sha256(weights).hexdigest()[:16])


if __name__ == "__main__":
    main(*sys.argv[1:2])
