"""Meta-learning (MAML): starting weights from which ten points are enough to learn a new sine wave.

    python examples/maml/train.py fit                        # train, or go on where it was
    python examples/maml/train.py fit --first_order true     # without second derivatives
    python examples/maml/train.py fit --help

Every task is a sine wave of its own amplitude and phase. The inner loop takes a few gradient steps
on ten of its points, the support; the outer loop trains the weights that the inner loop starts
from, by the loss on ten others, the query.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils.data import DataLoader, Dataset

from dream_trainer import (
    Callback,
    CheckpointParameters,
    DreamCLI,
    DreamTrainer,
    DreamTrainerConfig,
    TrainingParameters,
)

#: Inputs and targets of the support, then of the query, each (points, 1), or (tasks, points, 1).
Task = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(kw_only=True)
class MAMLConfig(DreamTrainerConfig):
    project: str = "maml"
    experiment: str | None = "sines"
    training_parameters: TrainingParameters = field(
        default_factory=lambda: TrainingParameters(n_epochs=10)
    )
    checkpoint_parameters: CheckpointParameters = field(
        default_factory=lambda: CheckpointParameters(every_n_steps=100, monitor="val/loss")
    )
    n_tasks: int = 10_000
    """Tasks to train on."""
    n_val_tasks: int = 500
    """Tasks to validate on, which are never trained on."""
    n_points: int = 10
    """Points in the support of a task, and as many in its query."""
    tasks_per_batch: int = 25
    """Tasks per outer step on one rank."""
    inner_steps: int = 1
    """Gradient steps on the support in training."""
    val_inner_steps: int = 5
    """Gradient steps on the support in validation."""
    inner_lr: float = 0.01
    """Learning rate of the inner loop."""
    lr: float = 2e-3
    """Highest learning rate of the outer loop."""
    width: int = 40
    """Features of the two hidden layers."""
    first_order: bool = False
    """Take the inner gradients for constants: cheaper, and no longer the exact gradient."""


class SineTasks(Dataset[Task]):
    """Item i is always the same task, so that nothing but the index has to be remembered.

    Args:
        indices: of the tasks; sets whose indices do not meet have no task in common.
        n_points: in the support, and in the query.
    """

    def __init__(self, indices: range, n_points: int) -> None:
        self.indices, self.n_points = indices, n_points

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: int) -> Task:
        generator = torch.Generator().manual_seed(self.indices[item])
        draws = torch.rand(2 + 2 * self.n_points, generator=generator)
        amplitude, phase = 0.1 + 4.9 * draws[0], math.pi * draws[1]
        x = (10 * draws[2:] - 5).unsqueeze(1)
        y = amplitude * torch.sin(x - phase)
        return x[: self.n_points], y[: self.n_points], x[self.n_points :], y[self.n_points :]


class MetaLearner(nn.Module):
    """A network and its inner loop, in one module: DDP reduces what is called through it."""

    def __init__(self, width: int, inner_lr: float) -> None:
        super().__init__()
        self.inner_lr = inner_lr
        self.net = nn.Sequential(
            nn.Linear(1, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1)
        )

    def forward(self, tasks: Task, inner_steps: int, create_graph: bool) -> Tensor:
        """Mean query losses after 0, 1, ... ``inner_steps`` inner steps.

        Args:
            tasks: a batch of them.
            inner_steps: gradient steps on the support.
            create_graph: let gradients of the losses flow through those of the inner loop.
        """
        support_x, support_y, query_x, query_y = tasks
        num_tasks = len(support_x)
        # Each task changes weights of its own, and all begin with the same ones.
        weights = {
            name: weight.expand(num_tasks, *weight.shape)
            for name, weight in self.net.named_parameters()
        }
        losses = [self.losses(weights, query_x, query_y).mean()]
        for _ in range(inner_steps):
            # A task's loss depends on its own weights only, so one sum serves all tasks.
            loss = self.losses(weights, support_x, support_y).sum()
            gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=create_graph)
            weights = {
                name: weight - self.inner_lr * gradient
                for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
            }
            losses.append(self.losses(weights, query_x, query_y).mean())
        return torch.stack(losses)

    def losses(self, weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        """Mean squared error of each task under its own weights."""

        def predict(weights: dict[str, Tensor], x: Tensor) -> Tensor:
            return functional_call(self.net, weights, x)

        return (vmap(predict)(weights, x) - y).square().mean(dim=(1, 2))


class AdaptationTable(Callback):
    """Prints how the loss on new tasks falls with the inner steps."""

    def post_fit(self, trainer: MAMLTrainer) -> None:
        results = trainer.validation_results
        if not results:  # started again after its end, it has not validated
            return
        steps = range(1, trainer.config.val_inner_steps + 1)
        trainer.world.print("inner steps   query loss on new tasks")
        for taken, name in enumerate(["val/before", *(f"val/after_{taken}" for taken in steps)]):
            trainer.world.print(f"{taken:11}   {results[name]:.4f}")


class MAMLTrainer(DreamTrainer):
    config: MAMLConfig

    def __init__(self, config: MAMLConfig, **kwargs: object) -> None:
        config.callbacks.setdefault("adaptation", AdaptationTable())
        super().__init__(config, **kwargs)

    def configure_models(self) -> None:
        self.learner = MetaLearner(self.config.width, self.config.inner_lr)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.learner.parameters(), lr=self.config.lr)

    def configure_schedulers(self) -> torch.optim.lr_scheduler.LRScheduler:
        (optimizer,) = self.named_optimizers().values()
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.num_training_steps)

    def configure_dataloaders(self) -> tuple[DataLoader, DataLoader]:
        config = self.config
        seen = range(config.n_tasks)
        held_out = range(config.n_tasks, config.n_tasks + config.n_val_tasks)
        return (
            DataLoader(SineTasks(seen, config.n_points), config.tasks_per_batch, shuffle=True),
            DataLoader(SineTasks(held_out, config.n_points), batch_size=100),
        )

    def compute_loss(self, batch: Task, batch_idx: int) -> dict[str, Tensor]:
        losses = self.learner(batch, self.config.inner_steps, not self.config.first_order)
        return {"loss": losses[-1], "before": losses[0]}

    def validation_step(self, batch: Task, batch_idx: int) -> dict[str, Tensor]:
        # Validation runs under no_grad, and adapting to a new task needs gradients.
        with torch.enable_grad():
            losses = self.learner(batch, self.config.val_inner_steps, False).detach()
        after = {f"after_{taken}": loss for taken, loss in enumerate(losses[1:], start=1)}
        return {"loss": losses[-1], "before": losses[0], **after}


if __name__ == "__main__":
    DreamCLI(MAMLTrainer)
