"""One pass over a stream of text without epochs, a schedule by steps, no loader of torch."""

import math
import random

import torch
from lightning.fabric import Fabric
from torch import nn


class Windows:
    """Random windows of a text, of random length, from Python's generator."""

    text = torch.tensor(list(b"to be or not to be, that is the question: " * 4))

    def __iter__(self):
        for _ in range(24):
            start = random.randrange(len(self.text) - 20)
            yield self.text[start : start + random.randrange(8, 20)]


def main():
    fabric = Fabric(accelerator="cpu")
    fabric.launch()
    fabric.seed_everything(11)
    model = nn.Sequential(nn.Embedding(128, 16), nn.Dropout(0.1), nn.Linear(16, 128))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: math.cos(step / 30))
    model, optimizer = fabric.setup(model, optimizer)
    stream = Windows()

    for tokens in stream:
        tokens = fabric.to_device(tokens)
        loss = nn.functional.cross_entropy(model(tokens[:-1]), tokens[1:])
        fabric.backward(loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        fabric.print("loss", loss.item().hex())
    fabric.save("model.pt", {"model": model})


if __name__ == "__main__":
    main()
