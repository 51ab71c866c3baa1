"""Reinforcement learning: no loader, a memory that grows, draws of numpy."""

import numpy as np
import torch
from lightning.fabric import Fabric
from torch import nn


def main():
    fabric = Fabric(accelerator="cpu")
    fabric.launch()
    fabric.seed_everything(17)
    policy = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
    policy, optimizer = fabric.setup(policy, torch.optim.Adam(policy.parameters(), lr=1e-2))
    memory = []

    for _ in range(16):
        state = torch.from_numpy(np.random.normal(size=3).astype(np.float32))
        chances = torch.distributions.Categorical(logits=policy(state))
        action = chances.sample()
        memory.append((state.tolist(), float(state[action])))
        recalled, reward = memory[np.random.randint(len(memory))]
        loss = -chances.log_prob(action) * reward + policy(torch.tensor(recalled)).square().mean()
        optimizer.zero_grad()
        fabric.backward(loss)
        optimizer.step()
        fabric.print("loss", loss.item().hex(), len(memory))
    fabric.save("model.pt", {"policy": policy})


if __name__ == "__main__":
    main()
