"""A GAN that draws handwritten digits of 8 x 8 pixels, under a minute on a CPU.

    python examples/gan/train.py fit                              # train, or go on where it was
    python examples/gan/train.py fit --experiment long --training_parameters.n_epochs 200
    python examples/gan/train.py fit --help

Two models and two optimizers take turns on every batch. The run directory gets `samples.png`
beside the metrics log and the checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import Metric

from dream_trainer import (
    EMA,
    Callback,
    CheckpointParameters,
    DreamCLI,
    DreamTrainer,
    DreamTrainerConfig,
    TrainingParameters,
)

PICTURE_ROWS, PICTURE_COLUMNS = 6, 16


@dataclass(kw_only=True)
class GANConfig(DreamTrainerConfig):
    project: str = "gan"
    experiment: str | None = "digits"
    training_parameters: TrainingParameters = field(
        default_factory=lambda: TrainingParameters(n_epochs=50, val_every_n_epochs=5)
    )
    checkpoint_parameters: CheckpointParameters = field(
        default_factory=lambda: CheckpointParameters(every_n_epochs=5, monitor="val/frechet")
    )
    latent_size: int = 32
    """Random numbers that a picture is made from."""
    width: int = 32
    """Channels of the layers at 8 x 8 pixels; those at 4 x 4 have twice as many."""
    batch_size: int = 64
    """Real images, and as many generated ones, per batch on one rank."""
    generator_lr: float = 1e-3
    """Learning rate of the generator, at the beginning; it falls to zero."""
    discriminator_lr: float = 1e-3
    """Learning rate of the discriminator, at the beginning; it falls to zero."""
    ema_decay: float = 0.98
    """How much of the average of the generator's weights stays in a step."""
    real_target: float = 0.9
    """What the discriminator should say about a real image; below 1 it stays unsure of itself."""


class Generator(nn.Module):
    """From latents to images with values from 0 to 1."""

    picture_latents: Tensor

    def __init__(self, latent_size: int, width: int) -> None:
        super().__init__()
        self.latent_size = latent_size
        self.layers = nn.Sequential(
            nn.Linear(latent_size, 2 * width * 4 * 4, bias=False),
            nn.Unflatten(1, (2 * width, 4, 4)),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(2 * width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 1, 3, padding=1),
            nn.Sigmoid(),
        )
        # A buffer, so that the picture of a checkpoint shows the same digits wherever it is drawn.
        latents = torch.randn(PICTURE_ROWS * PICTURE_COLUMNS, latent_size)
        self.register_buffer("picture_latents", latents)

    def forward(self, latents: Tensor) -> Tensor:
        return self.layers(latents)


class Discriminator(nn.Module):
    """One logit per image: is it real?"""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.Dropout(0.3),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Dropout(0.3),
            nn.Flatten(),
            nn.Linear(2 * width * 4 * 4, 1),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images).squeeze(1)


class FrechetDistance(Metric):
    """How far apart two sets of images are, by the means and covariances of their pixels.

    Sums are enough to know both, so it can be updated batch by batch and added over ranks.
    """

    higher_is_better = False
    real: Tensor
    fake: Tensor

    def __init__(self, n_pixels: int) -> None:
        super().__init__()
        # The second moments of the pixels and of a constant 1, which gives the mean and the count.
        zeros = torch.zeros(n_pixels + 1, n_pixels + 1, dtype=torch.float64)
        self.add_state("real", zeros, dist_reduce_fx="sum")
        self.add_state("fake", zeros.clone(), dist_reduce_fx="sum")

    def update(self, real: Tensor, fake: Tensor) -> None:
        self.real += self._moments(real)
        self.fake += self._moments(fake)

    def compute(self) -> Tensor:
        (mean_r, cov_r), (mean_f, cov_f) = self._gaussian(self.real), self._gaussian(self.fake)
        # The trace of the square root of cov_r @ cov_f, by way of a symmetric matrix.
        values, vectors = torch.linalg.eigh(cov_r)
        root = vectors * values.clamp(min=0).sqrt() @ vectors.T
        shared = torch.linalg.eigvalsh(root @ cov_f @ root).clamp(min=0).sqrt().sum()
        return (mean_r - mean_f).square().sum() + cov_r.trace() + cov_f.trace() - 2 * shared

    @staticmethod
    def _moments(images: Tensor) -> Tensor:
        pixels = F.pad(images.flatten(1).double(), (0, 1), value=1.0)
        return pixels.T @ pixels

    @staticmethod
    def _gaussian(moments: Tensor) -> tuple[Tensor, Tensor]:
        moments = moments / moments[-1, -1]
        mean = moments[-1, :-1]
        return mean, moments[:-1, :-1] - torch.outer(mean, mean)


class Picture(Callback):
    """Draws what the averaged generator makes of latents that never change."""

    @torch.no_grad()
    def post_fit(self, trainer: GANTrainer) -> None:
        trainer.generator.eval()
        with trainer.callbacks["ema"].swapped(trainer):
            images = trainer.generator(trainer.generator.picture_latents)
        trainer.generator.train()
        if trainer.world.is_global_zero:
            draw(images.float().cpu(), trainer)


def draw(images: Tensor, trainer: GANTrainer) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    # One image of all: each digit gets a border of a pixel.
    tiles = F.pad(images.squeeze(1), (0, 1, 0, 1), value=0.5)
    rows = tiles.unflatten(0, (PICTURE_ROWS, PICTURE_COLUMNS)).transpose(1, 2)
    figure, axes = plt.subplots(figsize=(9, 3.4), layout="constrained")
    axes.imshow(rows.flatten(0, 1).flatten(1).numpy(), cmap="gray_r", vmin=0, vmax=1)
    axes.set_axis_off()
    figure.savefig(trainer.run_directory / "samples.png", dpi=110)
    plt.close(figure)


class GANTrainer(DreamTrainer):
    config: GANConfig

    def __init__(self, config: GANConfig, **kwargs: object) -> None:
        # Validation, picture and export --weights ema are of an average over the last steps.
        average = EMA(config.ema_decay, warm_up=True, models=["generator"], average_buffers=True)
        config.callbacks.setdefault("ema", average)
        config.callbacks.setdefault("picture", Picture())
        super().__init__(config, **kwargs)

    def configure_models(self) -> None:
        self.generator = Generator(self.config.latent_size, self.config.width)
        self.discriminator = Discriminator(self.config.width)

    def configure_metrics(self) -> None:
        self.frechet = FrechetDistance(n_pixels=8 * 8)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        # They are named after what they train: "generator" and "discriminator".
        betas = (0.5, 0.999)
        return [
            torch.optim.Adam(self.generator.parameters(), self.config.generator_lr, betas),
            torch.optim.Adam(self.discriminator.parameters(), self.config.discriminator_lr, betas),
        ]

    def configure_schedulers(self) -> list[torch.optim.lr_scheduler.LRScheduler]:
        # The two chase each other for as long as they move: the last steps are small.
        return [
            torch.optim.lr_scheduler.LambdaLR(one, lambda step: 1 - step / self.num_training_steps)
            for one in self.named_optimizers().values()
        ]

    def configure_dataloaders(self) -> tuple[DataLoader, DataLoader]:
        digits = load_digits()
        images = torch.tensor(digits.images / 16, dtype=torch.float32).unsqueeze(1)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        val, train = images[order[:360]], images[order[360:]]
        size = self.config.batch_size
        return DataLoader(train, size, shuffle=True), DataLoader(val, size)

    def generate(self, num_images: int) -> Tensor:
        """Images from latents of the run's own random stream, which is in its checkpoints."""
        latents = torch.randn(num_images, self.config.latent_size, device=self.world.device)
        return self.generator(latents)

    def training_step(self, real: Tensor, batch_idx: int) -> dict[str, Tensor]:
        fake = self.generate(len(real))

        self.discriminator.requires_grad_(True)
        logits = self.discriminator(torch.cat([real, fake.detach()]))
        on_real, on_fake = logits.chunk(2)
        discriminator_loss = (
            F.binary_cross_entropy_with_logits(
                on_real, torch.full_like(on_real, self.config.real_target)
            )
            + F.softplus(on_fake).mean()
        )
        self.backward(discriminator_loss)
        self.step("discriminator")

        # Frozen, or the generator's loss would leave gradients in it for its next step.
        self.discriminator.requires_grad_(False)
        generator_loss = F.softplus(-self.discriminator(fake)).mean()
        self.backward(generator_loss)
        self.step("generator")

        return {
            "generator_loss": generator_loss,
            "discriminator_loss": discriminator_loss,
            "score_of_real": on_real.sigmoid().mean(),
            "score_of_fake": on_fake.sigmoid().mean(),
        }

    def validation_step(self, real: Tensor, batch_idx: int) -> None:
        self.frechet.update(real, self.generate(len(real)))


if __name__ == "__main__":
    DreamCLI(GANTrainer)
