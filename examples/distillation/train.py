"""Distillation on digits: a teacher knows all labels, a small student sees few and asks it.

    python examples/distillation/train.py fit                    # train, or go on where it was
    python examples/distillation/train.py fit --soft_weight 0 --experiment labels_only
    python examples/distillation/train.py fit --help

One run has two phases: a convolutional teacher learns for `teacher_epochs` epochs and is frozen,
then a student with a twelfth of its weights learns from it. A quarter of a minute on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from dream_trainer import (
    Callback,
    CheckpointParameters,
    DreamCLI,
    DreamTrainer,
    DreamTrainerConfig,
    TrainingParameters,
)


@dataclass(kw_only=True)
class DistillationConfig(DreamTrainerConfig):
    project: str = "distillation"
    experiment: str | None = "small_student"
    training_parameters: TrainingParameters = field(
        default_factory=lambda: TrainingParameters(n_epochs=30)
    )
    checkpoint_parameters: CheckpointParameters = field(
        default_factory=lambda: CheckpointParameters(
            every_n_steps=50, monitor="val/student_accuracy", mode="max"
        )
    )
    teacher_epochs: int = 8
    """Epochs in which the teacher learns; the student has the others."""
    temperature: float = 2.0
    """What both models' logits are divided by where they are compared."""
    soft_weight: float = 0.5
    """Share of the student's loss that comes from the teacher; the labels have the rest."""
    student_width: int = 32
    """Hidden features of the student."""
    student_labels: int = 100
    """Training images whose labels the student sees; of the others it has the teacher's answer."""
    batch_size: int = 64
    """Images per batch on one rank."""
    teacher_lr: float = 2e-3
    """Learning rate of the teacher."""
    student_lr: float = 5e-3
    """Learning rate of the student."""


def make_teacher() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(64 * 4 * 4, 10),
    )


def make_student(width: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


class FreezeTeacher(Callback):
    """Ends the teacher's phase: no gradients, no dropout, fixed batch norm statistics.

    It needs no state of its own. What is frozen and what is in eval mode is in every checkpoint,
    so that a run that resumes in the middle of an epoch finds the teacher as it was.
    """

    def pre_epoch(self, trainer: DistillationTrainer) -> None:
        if trainer.current_epoch == trainer.config.teacher_epochs:
            trainer.teacher.requires_grad_(False).eval()
            trainer.world.print("the teacher is frozen, the student begins")


class DistillationTrainer(DreamTrainer):
    config: DistillationConfig

    def __init__(self, config: DistillationConfig, **kwargs: object) -> None:
        config.callbacks.setdefault("freeze_teacher", FreezeTeacher())
        super().__init__(config, **kwargs)

    def configure_models(self) -> None:
        self.teacher = make_teacher()
        self.student = make_student(self.config.student_width)

    def configure_metrics(self) -> None:
        self.teacher_accuracy = MulticlassAccuracy(num_classes=10, average="micro")
        self.student_accuracy = MulticlassAccuracy(num_classes=10, average="micro")

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [
            torch.optim.AdamW(self.teacher.parameters(), self.config.teacher_lr),
            torch.optim.AdamW(self.student.parameters(), self.config.student_lr),
        ]

    def configure_dataloaders(self) -> tuple[DataLoader, DataLoader]:
        digits = load_digits()
        images = torch.tensor(digits.images / 16, dtype=torch.float32).unsqueeze(1)
        labels = torch.tensor(digits.target)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        val, train = order[:360], order[360:]
        # Few labels count more instead of others: a mean over all images is a mean over those.
        label_weights = torch.zeros(len(train))
        label_weights[: self.config.student_labels] = len(train) / self.config.student_labels
        size = self.config.batch_size
        return (
            DataLoader(
                TensorDataset(images[train], labels[train], label_weights), size, shuffle=True
            ),
            DataLoader(TensorDataset(images[val], labels[val]), size),
        )

    def training_step(self, batch: list[Tensor], batch_idx: int) -> dict[str, Tensor]:
        # The phase is a function of the epoch, so nothing has to remember it.
        if self.current_epoch < self.config.teacher_epochs:
            return self.train_teacher(*batch)
        return self.train_student(*batch)

    def train_teacher(self, images: Tensor, labels: Tensor, _: Tensor) -> dict[str, Tensor]:
        logits = self.teacher(images)
        loss = F.cross_entropy(logits, labels)
        self.backward(loss)
        self.step("teacher")
        return {"teacher_loss": loss}

    def train_student(
        self, images: Tensor, labels: Tensor, label_weights: Tensor
    ) -> dict[str, Tensor]:
        temperature, share = self.config.temperature, self.config.soft_weight
        with torch.no_grad():
            wanted = F.log_softmax(self.teacher(images) / temperature, dim=1)
        logits = self.student(images)
        soft = F.kl_div(
            F.log_softmax(logits / temperature, dim=1),
            wanted,
            log_target=True,
            reduction="batchmean",
        )
        hard = (F.cross_entropy(logits, labels, reduction="none") * label_weights).mean()
        # Gradients of softened logits shrink with the square of the temperature.
        loss = share * temperature**2 * soft + (1 - share) * hard
        self.backward(loss)
        self.step("student")
        return {"student_loss": loss, "soft_loss": soft, "hard_loss": hard}

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.teacher_accuracy.update(self.teacher(images), labels)
        self.student_accuracy.update(self.student(images), labels)


if __name__ == "__main__":
    DreamCLI(DistillationTrainer)
