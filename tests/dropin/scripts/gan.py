"""A GAN: two models, two optimizers, noise drawn in the step."""

import torch
from lightning.fabric import Fabric
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def main():
    fabric = Fabric(accelerator="cpu")
    fabric.launch()
    fabric.seed_everything(7)
    real = DataLoader(TensorDataset(torch.randn(48, 2) + 3), batch_size=6, shuffle=True)
    generator = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    critic = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 1))
    generator, for_generator = fabric.setup(
        generator, torch.optim.Adam(generator.parameters(), lr=1e-3)
    )
    critic, for_critic = fabric.setup(critic, torch.optim.Adam(critic.parameters(), lr=1e-3))
    loader = fabric.setup_dataloaders(real)

    for _ in range(3):
        for (x,) in loader:
            fake = generator(torch.randn(len(x), 4))
            for_critic.zero_grad()
            loss = (critic(fake.detach()) - critic(x)).mean()
            fabric.backward(loss)
            for_critic.step()
            for_generator.zero_grad()
            fabric.backward(-critic(fake).mean())
            for_generator.step()
            fabric.print("loss", loss.item().hex())
    fabric.save("model.pt", {"generator": generator, "critic": critic})


if __name__ == "__main__":
    main()
