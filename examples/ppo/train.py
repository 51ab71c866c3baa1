"""Reinforcement learning (PPO): a policy that balances gymnasium's CartPole in half a minute.

    pip install gymnasium
    python examples/ppo/train.py fit                        # train, or go on where it was
    python examples/ppo/train.py fit --n_environments 16 --lr 3e-4
    python examples/ppo/train.py fit --help

There is no data set. The train loader is a range of numbers; for each one the policy plays a
rollout, and takes many optimizer steps on it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from torch import Tensor, nn
from torch.distributions import Categorical

from dream_trainer import (
    CheckpointParameters,
    DreamCLI,
    DreamTrainer,
    DreamTrainerConfig,
    TrainingParameters,
)

EPISODE_STEPS = 500  # CartPole-v1 ends an episode after so many
TRAINING, VALIDATION = 0, 1  # what a seed of environments is for


@dataclass(kw_only=True)
class PPOConfig(DreamTrainerConfig):
    project: str = "ppo"
    experiment: str | None = "cartpole"
    training_parameters: TrainingParameters = field(
        default_factory=lambda: TrainingParameters(n_epochs=10, gradient_clip_val=20.0)
    )
    checkpoint_parameters: CheckpointParameters = field(
        default_factory=lambda: CheckpointParameters(
            every_n_steps=96, monitor="val/return", mode="max"
        )
    )
    n_environments: int = 8
    """Environments that are played side by side on one rank."""
    rollout_steps: int = EPISODE_STEPS
    """Steps of each environment in a rollout. Each rollout begins with new episodes."""
    rollouts_per_epoch: int = 2
    """Rollouts between validations."""
    passes: int = 6
    """How often the transitions of a rollout are trained on."""
    minibatch_size: int = 250
    """Transitions per optimizer step."""
    discount: float = 0.99
    """What a reward is worth one step later."""
    gae_lambda: float = 0.95
    """How far an advantage trusts what was played (1) rather than the next value (0)."""
    clip: float = 0.2
    """How far a probability may move within one rollout, as a share of what it was."""
    value_weight: float = 0.5
    """Weight of the value's loss."""
    entropy_weight: float = 0.01
    """Weight of the bonus for being undecided."""
    lr: float = 1e-3
    """Learning rate at the start; it falls to 0."""
    val_episodes: int = 10
    """Episodes of a validation, played without chance."""


@dataclass
class Transitions:
    """One per row, of all environments and steps of a rollout."""

    observations: Tensor
    actions: Tensor
    log_probs: Tensor
    advantages: Tensor
    returns: Tensor

    def __getitem__(self, rows: Tensor) -> Transitions:
        return Transitions(*(part[rows] for part in vars(self).values()))


class ActorCritic(nn.Module):
    """Logits of the actions, and the value of the state."""

    def __init__(self, n_inputs: int, n_actions: int, width: int = 64) -> None:
        super().__init__()
        self.actor = self.mlp(n_inputs, width, n_actions)
        self.critic = self.mlp(n_inputs, width, 1)
        nn.init.zeros_(self.actor[-1].weight)  # begin with all actions alike

    @staticmethod
    def mlp(n_inputs: int, width: int, n_outputs: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Linear(n_inputs, width),
            nn.Tanh(),
            nn.Linear(width, width),
            nn.Tanh(),
            nn.Linear(width, n_outputs),
        )

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        return self.actor(observations), self.critic(observations).squeeze(-1)


class PPOTrainer(DreamTrainer):
    config: PPOConfig

    def configure_models(self) -> None:
        self.environments = self.make_environments(self.config.n_environments)
        self.val_environments = self.make_environments(self.config.val_episodes)
        self.policy = ActorCritic(
            self.environments.single_observation_space.shape[0],
            int(self.environments.single_action_space.n),
        )

    def make_environments(self, number: int) -> VectorEnv:
        return gym.make_vec(
            "CartPole-v1",
            number,
            vectorization_mode="sync",
            vector_kwargs={"autoreset_mode": AutoresetMode.SAME_STEP},
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.policy.parameters(), lr=self.config.lr, eps=1e-5)

    def configure_schedulers(self) -> torch.optim.lr_scheduler.LRScheduler:
        (optimizer,) = self.named_optimizers().values()
        config = self.config
        transitions = config.n_environments * config.rollout_steps
        steps_per_rollout = config.passes * math.ceil(transitions / config.minibatch_size)
        # The trainer counts on one step per batch, and a batch of this one is a whole rollout.
        total = self.num_training_steps * steps_per_rollout
        return torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total)

    def configure_dataloaders(self) -> tuple[range, range]:
        # A sequence: it has a length, and going on in the middle of it costs nothing.
        return range(self.config.rollouts_per_epoch), range(1)

    def reset(self, environments: VectorEnv, *place: int) -> Tensor:
        """Begin new episodes, whose starts depend on the run's seed, place and rank alone."""
        sequence = np.random.SeedSequence(self.seed, spawn_key=(*place, self.world.dp_rank))
        seeds = sequence.generate_state(environments.num_envs).tolist()
        return self.to_tensor(environments.reset(seed=seeds)[0])

    def to_tensor(self, array: np.ndarray) -> Tensor:
        return torch.tensor(array, dtype=torch.float32, device=self.world.device)

    @torch.no_grad()
    def play(self, rollout_idx: int) -> tuple[Transitions, list[float]]:
        """Play with the policy as it is.

        Returns:
            What happened, and the return of each episode that came to its end.
        """
        environments, discount = self.environments, self.config.discount
        observation = self.reset(environments, TRAINING, self.current_epoch, rollout_idx)
        running, finished, steps = np.zeros(environments.num_envs), [], []
        for _ in range(self.config.rollout_steps):
            logits, value = self.policy(observation)
            distribution = Categorical(logits=logits)
            action = distribution.sample()  # by torch's global generator, which is in checkpoints
            following, reward, terminated, truncated, info = environments.step(action.cpu().numpy())
            over = terminated | truncated
            running += reward
            finished += running[over].tolist()
            running[over] = 0.0
            gain = self.to_tensor(reward)
            if truncated.any():  # the pole still stood: the value is what would have followed
                last = self.to_tensor(np.stack(info["final_obs"][truncated]))
                gain[self.to_tensor(truncated).bool()] += discount * self.policy(last)[1]
            log_prob = distribution.log_prob(action)
            steps.append((observation, action, log_prob, value, gain, self.to_tensor(~over)))
            observation = self.to_tensor(following)
        observations, actions, log_probs, values, gains, goes_on = map(
            torch.stack, zip(*steps, strict=True)
        )
        advantages = self.estimate_advantages(values, gains, goes_on, self.policy(observation)[1])
        parts = (observations, actions, log_probs, advantages, advantages + values)
        return Transitions(*(part.flatten(0, 1) for part in parts)), finished

    def estimate_advantages(
        self, values: Tensor, gains: Tensor, goes_on: Tensor, last_value: Tensor
    ) -> Tensor:
        """Generalised advantage estimation, from the last step back to the first."""
        discount, gae_lambda = self.config.discount, self.config.gae_lambda
        advantages, following = torch.zeros_like(values), last_value
        advantage = torch.zeros_like(last_value)
        for t in reversed(range(len(values))):
            surprise = gains[t] + discount * goes_on[t] * following - values[t]
            advantage = surprise + discount * gae_lambda * goes_on[t] * advantage
            advantages[t], following = advantage, values[t]
        return advantages

    def losses(self, batch: Transitions) -> dict[str, Tensor]:
        logits, values = self.policy(batch.observations)
        distribution = Categorical(logits=logits)
        ratio = (distribution.log_prob(batch.actions) - batch.log_probs).exp()
        clipped = ratio.clamp(1 - self.config.clip, 1 + self.config.clip)
        advantages = (batch.advantages - batch.advantages.mean()) / (batch.advantages.std() + 1e-8)
        policy_loss = -torch.minimum(ratio * advantages, clipped * advantages).mean()
        value_loss = (values - batch.returns).square().mean()
        entropy = distribution.entropy().mean()
        loss = (
            policy_loss
            + self.config.value_weight * value_loss
            - self.config.entropy_weight * entropy
        )
        return {
            "loss": loss,
            "policy_loss": policy_loss,
            "value_loss": value_loss,
            "entropy": entropy,
        }

    def training_step(self, batch: int, batch_idx: int) -> dict[str, float]:
        transitions, finished = self.play(batch)
        logged = []
        for _ in range(self.config.passes):
            order = torch.randperm(len(transitions.actions), device=self.world.device)
            for rows in order.split(self.config.minibatch_size):
                losses = self.losses(transitions[rows])
                self.backward(losses["loss"])
                self.step()
                logged.append({name: value.item() for name, value in losses.items()})
        means = {name: float(np.mean([row[name] for row in logged])) for name in logged[0]}
        return means | ({"return": float(np.mean(finished))} if finished else {})

    def validation_step(self, batch: int, batch_idx: int) -> dict[str, float]:
        """The same episodes at every validation, and always the likelier action."""
        environments = self.val_environments
        observation = self.reset(environments, VALIDATION)
        plays, returns = np.ones(environments.num_envs, dtype=bool), 0.0
        while plays.any():
            action = self.policy(observation)[0].argmax(dim=-1)
            following, reward, terminated, truncated, _ = environments.step(action.cpu().numpy())
            returns += reward[plays].sum()
            plays &= ~(terminated | truncated)
            observation = self.to_tensor(following)
        return {"return": float(returns / environments.num_envs)}


if __name__ == "__main__":
    DreamCLI(PPOTrainer)
