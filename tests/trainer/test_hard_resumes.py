"""What is easily lost in a restart, kept when a run stops at every step and goes on anew."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import Points, TinyTrainer, differences, exact_state, mlp, tiny
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics import MeanMetric, MinMaxMetric

from dream_trainer.callbacks import Callback
from dream_trainer.errors import CheckpointError

# A run seeds the global streams.
pytestmark = pytest.mark.may_leave("rng")

STEPS = 8


class Pending(TinyTrainer):
    """The generator's loss leaves gradients in the critic, and its next step uses them."""

    def configure_models(self) -> None:
        self.net, self.critic = mlp(), nn.Linear(1, 1)

    def configure_optimizers(self) -> Any:
        return {m: torch.optim.SGD(m.parameters(), 0.05) for m in (self.critic, self.net)}

    def configure_schedulers(self) -> Any:
        return None

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        made = self.net(batch["x"])
        loss = self.critic(made.detach()).mean() - self.critic(batch["y"]).mean()
        self.backward(loss)
        self.step("critic")
        self.backward(-self.critic(made).mean())
        self.step("net")
        return {"loss": loss}


class Factored(TinyTrainer):
    """Optimizer state with shapes of its own."""

    def configure_optimizers(self) -> Any:
        return torch.optim.Adafactor(self.net.parameters(), lr=0.05)


class OwnTypes(TinyTrainer):
    """Optimizer state with types of its own."""

    def configure_models(self) -> None:
        self.net = mlp().double()

    def configure_optimizers(self) -> Any:
        return torch.optim.NAdam(self.net.parameters(), lr=0.05)

    def compute_loss(self, batch: Any, batch_idx: int) -> Any:
        return super().compute_loss({**batch, "x": batch["x"].double()}, batch_idx)


class MetricsOfMetrics(TinyTrainer):
    """Metrics made of others, whose state is in those."""

    def configure_metrics(self) -> None:
        self.one, self.two = MeanMetric(), MeanMetric()
        self.both = self.one + self.two
        self.range = MinMaxMetric(MeanMetric())

    def compute_loss(self, batch: Any, batch_idx: int) -> Any:
        loss = super().compute_loss(batch, batch_idx)
        for number, metric in enumerate((self.one, self.two, self.range)):
            metric.update(loss.detach() + number)
        return loss


class StatefulLoader:
    """Goes on where it is, whoever iterates."""

    def __init__(self, num_batches: int) -> None:
        self.num_batches, self.position = num_batches, 0

    def __iter__(self) -> Iterator[Any]:
        data = Points(4 * self.num_batches)
        while self.position < self.num_batches:
            first, self.position = 4 * self.position, self.position + 1
            samples = [data[i] for i in range(first, first + 4)]
            yield {name: torch.stack([s[name] for s in samples]) for name in samples[0]}
        self.position = 0

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class CutEpochs(TinyTrainer):
    """Epochs that end before their loader does."""

    def configure_dataloaders(self) -> Any:
        return StatefulLoader(5)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        for index in range(12):
            x = torch.randn(3)
            yield {"x": x, "y": x.sum().sin().reshape(1), "index": torch.tensor(index)}


class WorkersOfAStream(TinyTrainer):
    """Worker processes that live across epochs, seeded by a generator that moves on."""

    def configure_dataloaders(self) -> Any:
        generator = torch.Generator().manual_seed(3)
        return DataLoader(Stream(), 4, num_workers=1, persistent_workers=True, generator=generator)


class Groups(TinyTrainer):
    """The last layer alone trains first; a callback adds the others later."""

    def configure_models(self) -> None:
        super().configure_models()
        self.net[0].requires_grad_(False)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.net[3].parameters(), lr=self.config.lr)


class Unfreezes(Callback):
    def post_train_step(self, trainer: Any, *arguments: Any) -> None:
        if trainer.global_step == 3:
            first = trainer.get_module("net.0").requires_grad_()
            (optimizer,) = trainer.named_optimizers().values()
            group = {"params": list(first.parameters()), "lr": 0.01, "initial_lr": 0.01}
            optimizer.add_param_group(group)
            scheduler = trainer.get_scheduler_from_optimizer(optimizer)
            scheduler.base_lrs.append(0.01)


class Counting(torch.optim.SGD):
    """State that is no parameter's, and state beside torch's two entries."""

    calls = 0

    def step(self, closure: Any = None) -> Any:
        self.calls += 1
        self.state["all"] = {"sum": self.state.get("all", {"sum": torch.zeros(1)})["sum"] + 1}
        for group in self.param_groups:
            group["lr"] = 0.05 / (self.calls + float(self.state["all"]["sum"]))
        return super().step(closure)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "calls": self.calls}

    def load_state_dict(self, state: Any) -> None:
        super().load_state_dict({k: v for k, v in state.items() if k != "calls"})
        self.calls = state["calls"]


class OwnOptimizer(TinyTrainer):
    def configure_optimizers(self) -> Any:
        return Counting(self.net.parameters(), lr=0.05)

    def configure_schedulers(self) -> Any:
        return None


class MetricInside(TinyTrainer):
    """A metric that is part of the model, and steers it."""

    def configure_models(self) -> None:
        self.net = nn.ModuleDict({"body": mlp(), "mean": MeanMetric()})

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), lr=0.05)

    def compute_loss(self, batch: Any, batch_idx: int) -> Any:
        body, mean = self.net.module["body"], self.net.module["mean"]
        loss = (body(batch["x"]) - batch["y"]).square().mean()
        if torch.is_grad_enabled():
            mean.update(loss.detach())
        return loss * mean.compute()


class Normed(TinyTrainer):
    def configure_models(self) -> None:
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))


class FreezesStatistics(Callback):
    def post_train_step(self, trainer: Any, *arguments: Any) -> None:
        if trainer.global_step == 3:
            trainer.get_module("net.1").eval()


class Extremes(TinyTrainer):
    """A metric that remembers more than its last reset."""

    def configure_metrics(self) -> None:
        self.range = MinMaxMetric(MeanMetric())

    def compute_loss(self, batch: Any, batch_idx: int) -> Any:
        loss = super().compute_loss(batch, batch_idx)
        self.range.update(loss.detach())
        return loss


class LateValues(Callback):
    def post_epoch(self, trainer: Any) -> None:
        trainer.log("late", float(trainer.global_step))

    def post_validation_epoch(self, trainer: Any, results: Any) -> None:
        trainer.log("validated", float(trainer.global_step))


CASES: dict[str, tuple[type[TinyTrainer], dict[str, Any]]] = {
    "pending gradients": (Pending, {}),
    "factored state": (Factored, {}),
    "own types": (OwnTypes, {}),
    "metrics of metrics": (MetricsOfMetrics, {}),
    "cut epochs": (CutEpochs, {"train_steps_per_epoch": 3}),
    "workers of a stream": (WorkersOfAStream, {}),
    "groups added": (Groups, {"callbacks": Unfreezes}),
    "optimizer of its own": (OwnOptimizer, {}),
    "statistics frozen": (Normed, {"callbacks": FreezesStatistics}),
    "extremes": (Extremes, {"num_samples": 12}),
    "metric inside a model": (MetricInside, {}),
    "late values": (
        TinyTrainer,
        {"num_samples": 12, "val_every_n_steps": 2, "callbacks": LateValues},
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:.*has no state_dict:UserWarning")
def test_stopping_at_every_step_changes_nothing(tmp_path: Path, case: str) -> None:
    kind, options = CASES[case]

    def run(experiment: str, max_steps: int) -> Any:
        known = {key: value for key, value in options.items() if key != "callbacks"}
        callbacks = {"one": options["callbacks"]()} if "callbacks" in options else {}
        trainer = tiny(
            tmp_path,
            kind,
            **{"experiment": experiment, "n_epochs": None} | known,
            callbacks=callbacks,
            max_steps=max_steps,
        )
        trainer.fit()
        return trainer

    straight = run("straight", STEPS)
    for steps in range(1, STEPS + 1):
        stopped = run("stopped", steps)
    assert differences(exact_state(straight), exact_state(stopped)) == []
    logs = [(t.run_directory / "metrics.jsonl").read_bytes() for t in (straight, stopped)]
    assert logs[0] == logs[1]


def test_a_state_inside_a_step_is_refused(tmp_path: Path) -> None:
    class Early(Callback):
        def pre_optimizer_step(self, trainer: Any, optimizer: Any) -> None:
            trainer.state_dict()

    with pytest.raises(RuntimeError, match="inside a training step"):
        tiny(tmp_path, callbacks={"early": Early()}).fit()


def test_a_generator_that_is_used_up_is_an_error_and_no_endless_run(tmp_path: Path) -> None:
    class Once(TinyTrainer):
        def configure_dataloaders(self) -> Any:
            data = Points(8)
            batches = DataLoader(data, 4)
            return (batch for batch in batches)

    with pytest.raises(RuntimeError, match="gave no batch in epoch 1"):
        tiny(tmp_path, Once, n_epochs=None, max_steps=100).fit()


def test_validating_leaves_a_save_that_is_under_way_alone(tmp_path: Path) -> None:
    trainer = tiny(tmp_path, max_steps=2)
    trainer.fit()
    under_way = trainer.run_directory / "checkpoints" / ".step-00000003.abcdef01.tmp"
    under_way.mkdir()
    before = sorted(trainer.run_directory.rglob("*"))
    assert tiny(tmp_path, max_steps=2).validate()
    assert sorted(trainer.run_directory.rglob("*")) == before


def test_a_write_that_fails_in_torch_leaves_nothing_and_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.distributed.checkpoint import filesystem

    trainer = tiny(tmp_path, max_steps=2)
    trainer.fit()
    before = sorted((trainer.run_directory / "checkpoints").rglob("*"))

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(filesystem, "_write_item", full)
    with pytest.raises(CheckpointError, match="No space left"):
        tiny(tmp_path, max_steps=3).fit()
    assert sorted((trainer.run_directory / "checkpoints").rglob("*")) == before
