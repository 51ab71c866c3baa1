"""Two loader workers that draw, a model with batch norm, an average of its weights."""

import numpy as np
import torch
from lightning.fabric import Fabric
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Dataset


class Noisy(Dataset):
    def __init__(self):
        self.rng = np.random.default_rng(1)

    def __len__(self):
        return 36

    def __getitem__(self, index):
        x = torch.full((4,), index / 36) + 0.1 * torch.randn(4)
        return x + float(self.rng.normal()) * 0.1, torch.tensor([index / 36])


def main():
    fabric = Fabric(accelerator="cpu")
    fabric.launch()
    fabric.seed_everything(13)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))
    average = AveragedModel(model)
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-3)
    wrapped, optimizer = fabric.setup(model, optimizer)
    loader = DataLoader(Noisy(), batch_size=4, shuffle=True, num_workers=2)

    for _ in range(2):
        for x, y in loader:
            loss = nn.functional.mse_loss(wrapped(x), y)
            fabric.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            average.update_parameters(model)
            fabric.print("loss", loss.item().hex())
    fabric.save("model.pt", {"model": model, "average": average})


if __name__ == "__main__":
    main()
