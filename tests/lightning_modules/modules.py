"""LightningModules of many kinds, written as for Lightning's own Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import torch
import torchmetrics
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from dream_trainer.configs import CheckpointParameters, DeviceParameters, TrainingParameters
from dream_trainer.lightning_modules import LightningModuleTrainer, LightningModuleTrainerConfig


def points(seed: int, length: int = 24) -> TensorDataset:
    x = torch.randn(length, 4, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, x.sum(1, keepdim=True).sin())


class Plain(lightning.LightningModule):
    """Loaders in order and no dropout: the same numbers under any trainer."""

    def __init__(self, width: int = 8, lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        with torch.random.fork_rng():
            torch.manual_seed(7)
            self.net = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return F.mse_loss(self(x), y)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), prog_bar=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)

    def train_dataloader(self) -> Any:
        return DataLoader(points(1), batch_size=4)

    def val_dataloader(self) -> Any:
        return DataLoader(points(2, 10), batch_size=4)


class OneCycle(Plain):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        total = self.trainer.estimated_stepping_batches
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.3, total_steps=int(total))
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class Plateau(Plain):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.5)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        return {"optimizer": optimizer, "lr_scheduler": scheduler, "monitor": "val_loss"}


class EverySecondEpoch(Plain):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        config = {"scheduler": scheduler, "interval": "epoch", "frequency": 2}
        return {"optimizer": optimizer, "lr_scheduler": config}


class WarmUp(Plain):
    """Its own ``optimizer_step``, as in Lightning's pages."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
        optimizer.step(closure=closure)
        if self.trainer.global_step < 5:
            scale = min(1.0, (self.trainer.global_step + 1) / 5)
            for group in optimizer.param_groups:
                group["lr"] = scale * self.hparams.lr


class ClipsItself(Plain):
    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any, gradient_clip_algorithm: Any
    ) -> None:
        self.clip_gradients(optimizer, gradient_clip_val=0.01, gradient_clip_algorithm="norm")


class OwnBackward(Plain):
    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def on_after_backward(self) -> None:
        for parameter in self.parameters():
            assert parameter.grad is not None
            parameter.grad.mul_(0.5)


class WithoutIndex(Plain):
    """Steps that leave out what they do not need."""

    def training_step(self, batch: Any) -> Any:
        return self.loss(batch)

    def validation_step(self, batch: Any) -> None:
        self.log("val_loss", self.loss(batch))


class SkipsBatches(Plain):
    """None is a batch that trains nothing."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if batch_idx % 3 == 1 else self.loss(batch)


class EverySecondBatch(Plain):
    """A batch whose closure runs without a step is dropped."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
        if batch_idx % 2:
            optimizer.step(closure=closure)
        else:
            closure()


class StepPlateau(Plain):
    """A schedule by steps on the newest value of a step."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.5)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1)
        config = {"scheduler": plateau, "interval": "step", "monitor": "train_loss"}
        return {"optimizer": optimizer, "lr_scheduler": config}


class Averaged(Plain):
    """An average of the weights, kept in hooks and in the checkpoint."""

    def on_fit_start(self) -> None:
        if not hasattr(self, "average"):
            self.average = [parameter.detach().clone() for parameter in self.parameters()]

    def on_before_zero_grad(self, optimizer: Any) -> None:
        pairs = zip(self.average, self.parameters(), strict=True)
        self.average = [0.5 * one + 0.5 * parameter.detach() for one, parameter in pairs]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["average"] = list(self.average) if hasattr(self, "average") else []

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.average = list(checkpoint["average"])


class Adversarial(Plain):
    """Two optimizers by hand, toggled, with schedulers and a gradient that is clipped."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        with torch.random.fork_rng():
            torch.manual_seed(8)
            self.judge = nn.Linear(1, 1)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        maker, judge = self.optimizers()
        self.toggle_optimizer(maker)
        loss = F.mse_loss(self.net(x), y) - 0.1 * self.judge(self.net(x)).mean()
        maker.zero_grad()
        self.manual_backward(loss)
        maker.step()
        self.untoggle_optimizer(maker)
        with judge.toggle_model():
            judge_loss = self.judge(self.net(x).detach()).mean() - self.judge(y).mean()
            judge.zero_grad()
            self.manual_backward(judge_loss)
            self.clip_gradients(judge, gradient_clip_val=0.1, gradient_clip_algorithm="norm")
            judge.step()
        if self.trainer.is_last_batch:
            for scheduler in self.lr_schedulers():
                scheduler.step()
        self.log_dict({"maker": loss, "judge": judge_loss})

    def configure_optimizers(self) -> Any:
        maker = torch.optim.Adam(self.net.parameters(), lr=0.01)
        judge = torch.optim.Adam(self.judge.parameters(), lr=0.01)
        schedulers = [torch.optim.lr_scheduler.StepLR(one, 1, 0.5) for one in (maker, judge)]
        return [maker, judge], schedulers


class Random(Plain):
    """Draws everywhere: dropout, a shuffled loader, augmentation in a transfer hook."""

    def __init__(self, width: int = 8, lr: float = 0.1) -> None:
        super().__init__(width, lr)
        self.drop = nn.Dropout(0.3)
        self.correct = torchmetrics.MeanMetric()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.drop(x))

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        x, y = batch
        return x + 0.1 * torch.randn_like(x), y

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.correct(loss)
        self.log("correct", self.correct, on_step=True, on_epoch=True)
        self.log("largest", loss, on_step=False, on_epoch=True, reduce_fx="max")
        return {"loss": loss, "extra": 1}

    def train_dataloader(self) -> Any:
        return DataLoader(points(1), batch_size=4, shuffle=True)

    def on_train_epoch_end(self) -> None:
        self.log("noise", torch.rand(()))


#: All that train to the same bits here as under Lightning, and resume.
KINDS: dict[str, type[Plain]] = {
    kind.__name__: kind
    for kind in (
        Plain,
        OneCycle,
        Plateau,
        EverySecondEpoch,
        WarmUp,
        ClipsItself,
        OwnBackward,
        WithoutIndex,
        SkipsBatches,
        EverySecondBatch,
        StepPlateau,
        Averaged,
        Adversarial,
    )
}


def config(root: Path, name: str = "run", **options: Any) -> LightningModuleTrainerConfig:
    """One epoch is 6 steps."""
    training = {"n_epochs": 3, "num_sanity_val_steps": 0} | options.pop("training", {})
    devices = {"accelerator": "cpu"} | options.pop("devices", {})
    checkpoints = options.pop("checkpoints", {})
    return LightningModuleTrainerConfig(
        root_dir=str(root),
        experiment=name,
        seed=3,
        training_parameters=TrainingParameters(**training),
        device_parameters=DeviceParameters(**devices),
        checkpoint_parameters=CheckpointParameters(**checkpoints),
        callbacks={"progress": None} | options.pop("callbacks", {}),
        **options,
    )


def trained(root: Path, kind: type[Plain], **options: Any) -> LightningModuleTrainer:
    trainer = LightningModuleTrainer(config(root, **options), kind())
    trainer.fit()
    return trainer
