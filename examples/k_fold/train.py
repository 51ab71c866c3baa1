"""Cross-validation: a network on a scikit-learn table, one run after another, one per fold.

    python examples/k_fold/train.py folds                      # all folds, or what is left of them
    python examples/k_fold/train.py folds --table wine --group wine
    python examples/k_fold/train.py fit --fold 2               # one fold alone, in the same place

Every fold has a run directory of its own. Killed and started again, folds that are done are only
validated, the one under way goes on where it was, and the table at the end is the same.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from sklearn import datasets
from sklearn.model_selection import StratifiedKFold
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC

from dream_trainer import (
    CheckpointParameters,
    Command,
    DreamCLI,
    DreamTrainer,
    DreamTrainerConfig,
    TrainingParameters,
)
from dream_trainer.errors import ConfigError


@dataclass(kw_only=True)
class KFoldConfig(DreamTrainerConfig):
    """A table, its split into folds, and the network that is trained on each."""

    project: str = "k_fold"
    training_parameters: TrainingParameters = field(
        default_factory=lambda: TrainingParameters(n_epochs=10)
    )
    checkpoint_parameters: CheckpointParameters = field(
        default_factory=lambda: CheckpointParameters(every_n_steps=50, keep_last=1)
    )
    table: Literal["breast_cancer", "iris", "wine"] = "breast_cancer"
    """The data set of scikit-learn."""
    n_folds: int = 5
    """Parts of the table; each is held out once."""
    fold: int = 0
    """The part that is held out, from 0; `folds` takes one after another."""
    split_seed: int = 0
    """Seed of the split. It is apart from the seed of the runs, so that the parts stay when
    that changes."""
    width: int = 32
    """Features of the hidden layers."""
    dropout: float = 0.2
    """Share of hidden features dropped in training."""
    batch_size: int = 32
    """Rows per batch on one rank."""
    lr: float = 3e-3
    """Highest learning rate."""

    def __post_init__(self) -> None:
        if not 0 <= self.fold < self.n_folds:
            raise ConfigError("fold", [f"{self.fold} is none of {self.n_folds} folds, from 0"])
        if self.experiment is None:
            self.experiment = f"fold{self.fold}"
        super().__post_init__()


class Standardize(nn.Module):
    """Columns with mean 0 and variance 1 over the rows that are trained on.

    The two are buffers, so they are saved and exported with the weights that were trained on them.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", rows.mean(dim=0))
        self.register_buffer("std", rows.std(dim=0))

    def forward(self, rows: Tensor) -> Tensor:
        return (rows - self.mean) / self.std


class KFoldTrainer(DreamTrainer):
    config: KFoldConfig

    def __init__(self, config: KFoldConfig, **kwargs: object) -> None:
        super().__init__(config, **kwargs)
        table = getattr(datasets, f"load_{config.table}")()
        rows = torch.tensor(table.data, dtype=torch.float32)
        labels = torch.tensor(table.target)
        self.n_columns, self.n_classes = rows.shape[1], len(table.target_names)
        splitter = StratifiedKFold(config.n_folds, shuffle=True, random_state=config.split_seed)
        train, val = list(splitter.split(rows, labels))[config.fold]
        self.train_rows = TensorDataset(rows[train], labels[train])
        self.val_rows = TensorDataset(rows[val], labels[val])

    def configure_models(self) -> None:
        width, dropout = self.config.width, self.config.dropout
        self.model = nn.Sequential(
            Standardize(self.train_rows.tensors[0]),
            nn.Linear(self.n_columns, width),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(width, self.n_classes),
        )

    def configure_metrics(self) -> None:
        self.accuracy = MulticlassAccuracy(num_classes=self.n_classes, average="micro")
        self.auroc = MulticlassAUROC(num_classes=self.n_classes)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), lr=self.config.lr, weight_decay=0.01)

    def configure_schedulers(self) -> torch.optim.lr_scheduler.LRScheduler:
        (optimizer,) = self.named_optimizers().values()
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.num_training_steps)

    def configure_dataloaders(self) -> tuple[DataLoader, DataLoader]:
        batch_size = self.config.batch_size
        return (
            DataLoader(self.train_rows, batch_size=batch_size, shuffle=True),
            DataLoader(self.val_rows, batch_size=batch_size),
        )

    def compute_loss(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        rows, labels = batch
        logits = self.model(rows)
        self.accuracy.update(logits, labels)
        self.auroc.update(logits, labels)
        return F.cross_entropy(logits, labels)


def run_folds(cli: DreamCLI) -> list[dict[str, float]]:
    """Train and validate a trainer per fold, then print what they reached.

    Returns:
        The validation results of each fold.
    """
    results = []
    for fold in range(cli.config.n_folds):
        # A copy with everything in it: callbacks have a state, which belongs to one run.
        config = copy.deepcopy(cli.config)
        config.fold, config.experiment = fold, f"fold{fold}"
        with KFoldTrainer(config) as trainer:
            trainer.fit()
            results.append(trainer.validate())
            print_line = trainer.world.print
    print_line(table_of(results))
    return results


def table_of(results: list[dict[str, float]]) -> str:
    """A line per fold, then mean and standard deviation of every column."""
    names = list(results[0])
    columns = {name: [one[name] for one in results] for name in names}
    lines = {f"fold {i}": list(one.values()) for i, one in enumerate(results)}
    lines["mean"] = [statistics.mean(column) for column in columns.values()]
    lines["std"] = [statistics.stdev(column) for column in columns.values()]
    head = "".join(f"{name:>14}" for name in names)
    body = [
        f"{title:<8}" + "".join(f"{value:14.4f}" for value in values)
        for title, values in lines.items()
    ]
    return "\n".join([f"{'':<8}{head}", *body])


class KFoldCLI(DreamCLI):
    commands: ClassVar[Mapping[str, Command]] = {
        "folds": Command(
            "train and validate every fold, and print mean and standard deviation",
            run_folds,
            makes_trainer=False,
        ),
        **DreamCLI.commands,
    }


if __name__ == "__main__":
    KFoldCLI(KFoldTrainer)
