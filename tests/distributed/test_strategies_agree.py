"""Single device, DDP and FSDP2 do the same training, and read each other's checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import TinyTrainer, flat, mlp, run_ranks, tiny
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torchmetrics import SumMetric

from dream_trainer.callbacks import Callback

pytestmark = pytest.mark.distributed

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "single": (1, {}),
    "ddp": (2, {"dp_replicate": 2}),
    "fsdp": (2, {"dp_replicate": 1, "dp_shard": 2}),
}


class Trainer(TinyTrainer):
    """Two blocks, so that sharding has something to split; a metric over samples."""

    def configure_models(self) -> None:
        class Net(nn.Module):
            def __init__(self, dropout: float) -> None:
                super().__init__()
                self.blocks = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))
                self.rest = mlp(dropout)

            def forward(self, x: Tensor) -> Tensor:
                for block in self.blocks:
                    x = x + block(x).tanh()
                return self.rest(x)

        self.net = Net(self.config.dropout)

    def configure_metrics(self) -> None:
        self.index_sum = SumMetric()

    def compute_loss(self, batch: Any, batch_idx: int) -> Any:
        self.index_sum.update(batch["index"])
        return super().compute_loss(batch, batch_idx)


class Weighted(Trainer):
    def compute_loss(self, batch: Any, batch_idx: int) -> Any:
        if not torch.is_grad_enabled():
            return super().compute_loss(batch, batch_idx)
        self.index_sum.update(batch["index"])
        weight = 1 + batch["index"] % 5
        losses = (self.net(batch["x"]) - batch["y"]).square()[:, 0]
        return {"loss": (losses * weight).sum() / weight.sum(), "weight": weight.sum()}


def fit(
    root: Path, layout: str, experiment: str, kind: type[TinyTrainer] = Trainer, **options: Any
) -> list[Any]:
    """Train with 4 samples a step under a layout; what rank 0 .. n-1 end with."""
    size, sizes = LAYOUTS[layout]

    def rank() -> Any:
        # Fabric refuses "64-true" for sharded strategies, but converts nothing under "32-true".
        torch.set_default_dtype(torch.float64)
        trainer = tiny(
            root,
            kind,
            experiment=experiment,
            devices=size,
            **{"batch_size": 4 // size, "gradient_clip_val": 0.5} | sizes | options,
        )
        trainer.fit()
        return flat(trainer.state_dict()["models"])

    return run_ranks(size, rank)


def log(root: Path, experiment: str) -> list[dict[str, float]]:
    path = root / "default" / "default" / experiment / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Trainer, {"num_samples": 22}),
        (Trainer, {"num_samples": 21, "gradient_accumulation_steps": 4}),
        (Weighted, {"num_samples": 22, "gradient_accumulation_steps": 4}),
        (Weighted, {"num_samples": 21}),
    ],
    ids=["uneven", "uneven window with filler", "weights", "weights with filler"],
)
def test_two_ranks_train_like_one(
    tmp_path: Path, layout: str, kind: type[TinyTrainer], options: dict[str, Any]
) -> None:
    fit(tmp_path, "single", "one", kind, **options)
    ranks = fit(tmp_path, layout, "two", kind, **options)
    assert ranks[0] == ranks[1]
    assert {dtype for dtype, *_ in ranks[0].values()} == {"torch.float64"}
    one, two = log(tmp_path, "one"), log(tmp_path, "two")
    assert [list(row) for row in one] == [list(row) for row in two]
    for a, b in zip(one, two, strict=True):
        for name in a.keys() - {"train/loss"} if kind is Weighted else a.keys():
            # The weighted loss of a step is logged as a mean over samples of each rank's own.
            assert a[name] == pytest.approx(b[name], rel=1e-10), (name, a["step"])
    assert {"train/grad_norm", "train/index_sum", "val/index_sum"} <= {k for r in one for k in r}


def test_the_global_batch_size_keeps_the_trajectory_when_the_number_of_ranks_changes(
    tmp_path: Path,
) -> None:
    options: dict[str, Any] = {"num_samples": 30, "global_batch_size": 8}
    for layout in ("single", "ddp"):
        fit(tmp_path, layout, layout, **options | {"batch_size": 2})
    one, two = log(tmp_path, "single"), log(tmp_path, "ddp")
    assert [row["step"] for row in one if "train/loss" in row] == [1, 2, 3, 4, 5, 6, 7, 8]
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-10)


def test_plain_tensors_load_into_sharded_models_whatever_order_the_ranks_keep(
    tmp_path: Path,
) -> None:
    """Distributing a tensor is a collective: ranks must go through the names alike."""

    class Name(str):
        """Hashes differently on every rank, as every ``str`` does under torchrun."""

        def __hash__(self) -> int:
            import os

            return hash(str(self)) * (1 if os.environ["RANK"] == "0" else -3) + 1

    names = [Name(f"m{i}") for i in range(6)]

    class Many(TinyTrainer):
        def configure_models(self) -> None:
            for name in names:
                setattr(self, str(name), nn.Linear(3, 3))

        def configure(self) -> None:
            super().configure()
            self._models = {name: self._models[str(name)] for name in names}

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([p for n in names for p in getattr(self, str(n)).parameters()])

        def configure_schedulers(self) -> Any:
            return None

    def rank() -> bool:
        trainer = tiny(tmp_path, Many, devices=2, dp_replicate=1, dp_shard=2, enable=False)
        state = trainer.state_dict()
        whole = {
            name: {key: torch.full(value.shape, float(i)) for key, value in model.items()}
            for i, (name, model) in enumerate(state["models"].items())
        }
        trainer.load_state_dict(state | {"models": whole})
        loaded = {n: m.weight.full_tensor() for n, m in trainer.named_models().items()}
        return all(bool((loaded[name] == float(i)).all()) for i, name in enumerate(names))

    assert run_ranks(2, rank) == [True, True]


class TwoModels(Trainer):
    """Two models with an optimizer each, GAN style."""

    def configure_models(self) -> None:
        super().configure_models()
        self.critic = mlp()

    def configure_optimizers(self) -> Any:
        return {
            self.net: torch.optim.AdamW(self.net.parameters(), lr=0.05),
            self.critic: torch.optim.SGD(self.critic.parameters(), lr=0.05, momentum=0.9),
        }

    def configure_schedulers(self) -> Any:
        return None

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        net, critic = self.named_optimizers().values()
        made = self.net(batch["x"])
        judged = self.critic(torch.cat([made.detach(), batch["x"][:, :2]], 1))
        critic_loss = (judged - batch["y"]).square().mean()
        self.backward(critic_loss)
        self.step(critic)
        loss = (made - batch["y"]).square().mean()
        self.backward(loss)
        self.step(net)
        return {"loss": loss, "critic_loss": critic_loss}


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_two_models_with_two_optimizers_train_and_resume(tmp_path: Path, layout: str) -> None:
    options: dict[str, Any] = {"gradient_accumulation_steps": 2, "num_samples": 22}
    fit(tmp_path, "single", "one", TwoModels, **options)
    straight = fit(tmp_path, layout, "two", TwoModels, **options)
    for a, b in zip(log(tmp_path, "one"), log(tmp_path, "two"), strict=True):
        assert a == pytest.approx(b, rel=1e-10)
    fit(tmp_path, layout, "cut", TwoModels, max_steps=4, **options)
    resumed = fit(tmp_path, layout, "cut", TwoModels, **options)
    assert resumed == straight
    assert log(tmp_path, "cut") == log(tmp_path, "two")


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
@pytest.mark.parametrize("cut", [4])
def test_a_resumed_run_on_two_ranks_is_the_same_run(tmp_path: Path, layout: str, cut: int) -> None:
    options: dict[str, Any] = {"num_samples": 22, "dropout": 0.3, "augment": True}
    straight = fit(tmp_path, layout, "straight", **options)
    fit(tmp_path, layout, "cut", max_steps=cut, **options)
    assert fit(tmp_path, layout, "cut", **options) == straight
    assert log(tmp_path, "cut") == log(tmp_path, "straight")


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_gradients_are_synchronised_on_the_last_batch_of_a_window_only(
    tmp_path: Path, layout: str
) -> None:
    size, sizes = LAYOUTS[layout]

    class Watches(Trainer):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.backward(self.compute_loss(batch, batch_idx))
            grad = self.named_models()["net"].blocks[0].weight.grad
            if isinstance(grad, DTensor):
                grad = grad.full_tensor()
            # FSDP2 keeps what is not reduced yet out of .grad.
            mine = None if grad is None else grad.tolist()
            seen = self.world.all_gather_object(mine)
            is_synchronised = seen[0] is not None and seen[0] == seen[1]
            watched.append((self.is_accumulating_gradients, is_synchronised))
            self.step()

    watched: list[tuple[bool, bool]] = []

    def rank() -> list[tuple[bool, bool]]:
        trainer = tiny(
            tmp_path,
            Watches,
            devices=size,
            batch_size=2,
            num_samples=20,  # five batches: windows of 3 and 2
            gradient_accumulation_steps=3,
            n_epochs=1,
            enable=False,
            **sizes,
        )
        trainer.fit()
        return watched

    window = [(True, False), (True, False), (False, True)]
    assert run_ranks(2, rank) == [window + window[1:]] * 2


def test_a_frozen_model_works_under_ddp(tmp_path: Path) -> None:
    class Teacher(Trainer):
        def configure_models(self) -> None:
            super().configure_models()
            self.teacher = mlp()
            self.teacher.requires_grad_(False)

        def compute_loss(self, batch: Any, batch_idx: int) -> Any:
            self.index_sum.update(batch["index"])
            return (self.net(batch["x"]) - self.teacher(batch["x"])).square().mean()

    for layout in ("ddp", "fsdp"):
        first, second = fit(tmp_path, layout, layout, Teacher, n_epochs=1)
        assert first == second
    one, other = (log(tmp_path, layout)[-1]["val/loss"] for layout in ("ddp", "fsdp"))
    assert one == pytest.approx(other, rel=1e-10)


def test_ranks_that_disagree_on_the_length_say_so_before_the_first_step(tmp_path: Path) -> None:
    class Uneven(Trainer):
        def configure_dataloaders(self) -> Any:
            train, _ = super().configure_dataloaders()
            return list(train)[: 3 + self.world.rank], None

    def rank() -> str:
        trainer = tiny(tmp_path, Uneven, devices=2, enable=False)
        try:
            trainer.fit()
        except ValueError as error:
            return str(error)
        return "no error"

    for text in run_ranks(2, rank):
        assert "the ranks have different numbers of batches (rank 0: 3, rank 1: 4)" in text


def test_the_seed_and_the_name_are_the_same_on_every_rank(tmp_path: Path) -> None:
    def rank() -> tuple[int, str, bytes]:
        trainer = tiny(tmp_path, Trainer, devices=2, seed=None, experiment=None, max_steps=1)
        trainer.fit()
        stream = trainer.state_dict()["rng"]["torch"].numpy().tobytes()
        return trainer.seed, str(trainer.run_directory), stream

    first, second = run_ranks(2, rank)
    assert first[:2] == second[:2]
    assert first[2] != second[2]  # each rank has a stream of its own


class Parameters(Callback):
    def __init__(self) -> None:
        self.kinds: set[str] = set()

    def pre_optimizer_step(self, trainer: Any, optimizer: Any) -> None:
        self.kinds |= {type(p).__name__ for g in optimizer.param_groups for p in g["params"]}


def test_fsdp_trains_what_it_sharded(tmp_path: Path) -> None:
    """The optimizer is made after sharding: trap 1 through the front door."""

    def rank() -> tuple[set[str], bool]:
        watch = Parameters()
        options: dict[str, Any] = {"devices": 2, "dp_replicate": 1, "dp_shard": 2}
        trainer = tiny(
            tmp_path, Trainer, callbacks={"watch": watch}, n_epochs=1, enable=False, **options
        )
        before = flat(trainer.state_dict()["models"])
        trainer.fit()
        after = flat(trainer.state_dict()["models"])
        return watch.kinds, all(before[name] != after[name] for name in before)

    assert run_ranks(2, rank) == [({"DTensor"}, True)] * 2
