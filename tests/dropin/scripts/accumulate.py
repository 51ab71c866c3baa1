"""Accumulation over three batches by the batch's index, clipping, a best value of its own."""

import torch
from lightning.fabric import Fabric
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def main():
    fabric = Fabric(accelerator="cpu", precision="bf16-mixed")
    fabric.launch()
    fabric.seed_everything(5)
    x = torch.randn(60, 6)
    data = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=4, shuffle=True)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    model, optimizer = fabric.setup(model, optimizer)
    loader = fabric.setup_dataloaders(data)
    best = {"loss": float("inf")}

    for _ in range(2):
        for index, (x, y) in enumerate(loader):
            is_accumulating = (index + 1) % 3 != 0
            with fabric.no_backward_sync(model, enabled=is_accumulating):
                loss = nn.functional.mse_loss(model(x), y)
                fabric.backward(loss / 3)
            if not is_accumulating:
                fabric.clip_gradients(model, optimizer, max_norm=1.0)
                optimizer.step()
                optimizer.zero_grad()
            best["loss"] = min(best["loss"], loss.item())
            fabric.print("loss", loss.item().hex(), best["loss"].hex())
    fabric.save("model.pt", {"model": model})


if __name__ == "__main__":
    main()
