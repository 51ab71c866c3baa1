"""Parts of a model train from their time on, with groups of their own, and go on exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import TinyTrainer, differences, exact_state, flat, tiny
from torch import nn

from dream_trainer import Callback, Unfreeze, Unfreezing, warm_up
from dream_trainer.errors import ConfigError, StateError
from dream_trainer.schedules import cosine

pytestmark = pytest.mark.may_leave("rng")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.body = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.3), nn.Linear(4, 4))
        self.head = nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(self.body(torch.tanh(self.norm(self.stem(x)))))


class Layered(TinyTrainer):
    """All parameters are in the optimizer; weight decay is for the weights alone."""

    def configure_models(self) -> None:
        self.net = Net()

    def configure_optimizers(self) -> Any:
        groups = self.groups([*self.net.named_parameters()])
        return torch.optim.AdamW(groups, lr=0.05)

    def groups(self, parameters: list[Any]) -> list[dict[str, Any]]:
        weights = [p for name, p in parameters if name.endswith("weight")]
        biases = [p for name, p in parameters if not name.endswith("weight")]
        return [{"params": weights, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0.0}]

    def configure_schedulers(self) -> Any:
        (optimizer,) = self.named_optimizers().values()
        return warm_up(cosine(optimizer, 30), 5)


class Filtered(Layered):
    """Only what is trained at the beginning is in the optimizer."""

    def groups(self, parameters: list[Any]) -> list[dict[str, Any]]:
        return super().groups([(n, p) for n, p in parameters if p.requires_grad])


class Named(Layered):
    """The optimizer knows its parameters by name, in one group; a scheduler multiplies."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.named_parameters(), lr=0.05, momentum=0.9)

    def configure_schedulers(self) -> Any:
        (optimizer,) = self.named_optimizers().values()
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)


KINDS = (Layered, Filtered, Named)


def parts() -> Unfreeze:
    return Unfreeze(
        {
            "net.stem": Unfreezing(epoch=2, lr_scale=0.1),
            "net.norm": Unfreezing(epoch=2, lr_scale=0.1, eval_mode=True),
            "net.body": Unfreezing(step=5, lr_scale=0.5, options={"weight_decay": 0.0}),
        }
    )


def made(root: Path, kind: type[TinyTrainer], **options: Any) -> Any:
    callbacks = {"unfreeze": parts()} | options.pop("callbacks", {})
    defaults = {"n_epochs": 3, "num_samples": 12, "enable": False}
    return tiny(root, kind, callbacks=callbacks, **defaults | options)


class Watches(Callback):
    """What moved in each step, and the rates that it had."""

    def __init__(self) -> None:
        self.moved: list[set[str]] = []
        self.rates: list[dict[str, float]] = []
        self._before: dict[str, Any] = {}

    def pre_optimizer_step(self, trainer: Any, optimizer: Any) -> None:
        net = trainer.named_models()["net"]
        names = {id(p): name for name, p in net.named_parameters()}
        self._before = flat(dict(net.named_parameters()))
        self.rates.append(
            {names[id(p)]: g["lr"] for g in optimizer.param_groups for p in g["params"]}
        )

    def post_optimizer_step(self, trainer: Any, optimizer: Any) -> None:
        after = flat(dict(trainer.named_models()["net"].named_parameters()))
        changed = differences(self._before, after)
        self.moved.append({path[1:].partition(".")[0] for path in changed})


@pytest.mark.parametrize("kind", KINDS)
def test_parts_begin_to_train_at_their_time_and_rate(tmp_path: Path, kind: Any) -> None:
    watches = Watches()
    trainer = made(tmp_path, kind, callbacks={"watches": watches})
    trainer.fit()
    assert watches.moved[:5] == [{"head"}] * 5
    assert watches.moved[5] == {"head", "body"}
    assert watches.moved[6:] == [{"head", "body", "stem", "norm"}] * 3
    for rates in watches.rates:
        assert len(rates) == 10
        for part, share in {"stem": 0.1, "norm": 0.1, "body.0": 0.5, "body.2": 0.5}.items():
            for name in (f"{part}.weight", f"{part}.bias"):
                assert rates[name] == pytest.approx(share * rates["head.weight"], rel=1e-12)
    (optimizer,) = trainer.components.optimizers.values()
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    net = trainer.named_models()["net"]
    assert decay[id(net.body[0].weight)] == decay[id(net.head.bias)] == 0.0
    if kind is Layered:
        assert decay[id(net.stem.weight)] == decay[id(net.head.weight)] == 0.1


def test_statistics_stay_as_they_are_until_then(tmp_path: Path) -> None:
    class Means(Callback):
        found: dict[int, float]

        def post_train_step(self, trainer: Any, *arguments: Any) -> None:
            net = trainer.named_models()["net"]
            mean = net.norm.running_mean.abs().sum().item()
            self.found[trainer.global_step] = mean
            assert (net.norm.training, net.stem.training) == (trainer.global_step > 6, True)

    means = Means()
    means.found = {}
    made(tmp_path, Layered, callbacks={"means": means}).fit()
    assert [step for step, mean in means.found.items() if mean == 0] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("save_frozen", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_it_goes_on_from_every_boundary(tmp_path: Path, kind: Any, save_frozen: bool) -> None:
    class Saves(Callback):
        count = 0

        def on_boundary(self, trainer: Any) -> None:
            trainer.save_checkpoint(tmp_path / str(Saves.count))
            Saves.count += 1

    options = {"save_frozen": save_frozen, "gradient_clip_val": 0.5}
    straight = made(tmp_path, kind, callbacks={"saves": Saves()}, **options)
    straight.fit()
    assert Saves.count == 12
    for number in range(Saves.count):
        again = made(tmp_path, kind, **options)
        again.load_checkpoint(tmp_path / str(number))
        again.fit()
        assert differences(exact_state(straight), exact_state(again)) == [], number


def test_what_waits_is_left_out_of_checkpoints_that_leave_out_frozen_weights(
    tmp_path: Path,
) -> None:
    saved: list[set[str]] = []

    class Looks(Callback):
        def on_boundary(self, trainer: Any) -> None:
            names = trainer.state_dict()["models"]["net"]
            saved.append({name.partition(".")[0] for name in names if "running" not in name})

    made(tmp_path, Layered, callbacks={"looks": Looks()}, save_frozen=False).fit()
    early, late = {"head", "norm"}, {"head", "norm", "body"}  # norm has a count of its own
    assert saved[:5] == [early] * 5
    assert saved[6:8] == [late, late | {"stem"}]


def test_the_longer_path_counts_and_a_due_time_that_came_closer_is_kept(tmp_path: Path) -> None:
    def run(n_epochs: int, **times: int) -> Any:
        unfreeze = Unfreeze({n.replace("_", "."): Unfreezing(epoch=e) for n, e in times.items()})
        trainer = tiny(
            tmp_path, Layered, n_epochs=n_epochs, num_samples=8, callbacks={"unfreeze": unfreeze}
        )
        trainer.fit()
        net = trainer.named_models()["net"]
        return {name for name, p in net.named_parameters() if not p.requires_grad}

    body = {"body.0.weight", "body.0.bias"}
    assert run(2, net_body=1, net_body_0=9) == body
    assert run(3, net_body=1, net_body_0=2) == set()


def test_a_run_without_them_does_not_go_on_with_them(tmp_path: Path) -> None:
    tiny(tmp_path, Layered, n_epochs=1).fit()
    with pytest.raises(StateError, match="param_groups"):
        tiny(tmp_path, Layered, n_epochs=2, callbacks={"unfreeze": parts()}).fit()


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({}, "names no part"),
        ({"net.stem": Unfreezing()}, "exactly one of epoch and step"),
        ({"net.stem": Unfreezing(epoch=1, step=2)}, "exactly one of epoch and step"),
        ({"net.stem": Unfreezing(epoch=0)}, "epoch=0"),
        ({"net.stem": Unfreezing(step=1, lr_scale=0.0)}, "lr_scale=0.0"),
        ({"net.stem": Unfreezing(step=1, options={"lr": 1.0})}, "options has 'lr'"),
        ({"net.stem": 2}, "not an Unfreezing"),
        ({"net.stam": Unfreezing(epoch=1)}, "no module 'stam' in net; there is: stem, norm"),
        ({"net.body.1": Unfreezing(epoch=1)}, "net.body.1 has no parameter"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, given: Any, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        tiny(tmp_path, Layered, callbacks={"u": Unfreeze(given)}, enable=False).fit()


def test_a_part_that_no_optimizer_could_train_is_named(tmp_path: Path) -> None:
    class Two(TinyTrainer):
        def configure_models(self) -> None:
            super().configure_models()
            self.other = nn.Linear(3, 1)

    unfreeze = Unfreeze({"other": Unfreezing(epoch=1)})
    with pytest.raises(ConfigError, match="other: no optimizer could train it"):
        tiny(tmp_path, Two, callbacks={"u": unfreeze}, enable=False).fit()
