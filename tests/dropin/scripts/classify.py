"""Classification: random crops in the data set, dropout, validation, a schedule by epochs."""

import torch
from lightning.fabric import Fabric
from torch import nn
from torch.utils.data import DataLoader, Dataset


class Points(Dataset):
    def __init__(self, length, seed):
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(length, 8, generator=generator)
        self.y = (self.x.sum(1) > 0).long()

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index] + 0.1 * torch.randn(8), self.y[index]


def main():
    fabric = Fabric(accelerator="cpu")
    fabric.launch()
    fabric.seed_everything(3)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    model, optimizer = fabric.setup(model, optimizer)
    train = fabric.setup_dataloaders(DataLoader(Points(40, 1), batch_size=5, shuffle=True))
    val = fabric.setup_dataloaders(DataLoader(Points(20, 2), batch_size=5, shuffle=True))

    for epoch in range(3):
        model.train()
        for x, y in train:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            fabric.backward(loss)
            optimizer.step()
            fabric.print("loss", loss.item().hex())
        model.eval()
        with torch.no_grad():
            correct = sum((model(x).argmax(1) == y).sum() for x, y in val)
        scheduler.step()
        fabric.print("val", epoch, fabric.all_reduce(correct.float(), reduce_op="sum").item())
    fabric.save("model.pt", {"model": model})


if __name__ == "__main__":
    main()
