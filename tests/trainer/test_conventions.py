"""DreamTrainer finds what the configure_* methods make, and says what it cannot use."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from support import TinyTrainer, mlp, tiny
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

from dream_trainer.data import ResumableLoader
from dream_trainer.errors import ConfigError, UnknownComponentError
from dream_trainer.trainer import DreamTrainer, DreamTrainerConfig
from dream_trainer.world.wrappers import unwrap

# A run seeds the global streams.
pytestmark = pytest.mark.may_leave("rng")


class TwoModels(TinyTrainer):
    def configure_models(self) -> None:
        self.net = mlp()
        self.head = nn.Linear(1, 1)

    def configure_schedulers(self) -> Any:
        return None

    def compute_loss(self, batch: Any, batch_idx: int) -> Any:
        return (self.head(self.net(batch["x"])) - batch["y"]).square().mean()


def prepared(root: Path, kind: type[TinyTrainer], **options: Any) -> Any:
    trainer = tiny(root, kind, enable=False, **options)
    trainer.prepare()
    return trainer


def with_optimizers(make: Any) -> type[TinyTrainer]:
    return type("Trainer", (TwoModels,), {"configure_optimizers": make})


def test_a_single_optimizer_is_named_after_its_model(tmp_path: Path) -> None:
    trainer = prepared(tmp_path, TinyTrainer)
    assert list(trainer.named_models()) == ["net"]
    assert list(trainer.named_optimizers()) == ["net"]
    assert list(trainer.named_schedulers()) == ["net"]


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda t: SGD([*t.net.parameters(), *t.head.parameters()]), ["net+head"]),
        (lambda t: [SGD(t.head.parameters()), SGD(t.net.parameters())], ["head", "net"]),
        (lambda t: (SGD(t.head.parameters()), SGD(t.net.parameters())), ["head", "net"]),
        (lambda t: {m: SGD(m.parameters()) for m in (t.net, t.head)}, ["net", "head"]),
        (
            lambda t: {"slow": SGD(t.net.parameters()), "fast": SGD(t.head.parameters())},
            ["slow", "fast"],
        ),
        (
            lambda t: [
                SGD([t.net.get_parameter("0.weight"), t.net.get_parameter("0.bias")]),
                SGD([t.net.get_parameter("3.weight"), t.net.get_parameter("3.bias")]),
                SGD(t.head.parameters()),
            ],
            ["net", "net_1", "head"],
        ),
    ],
    ids=["one for two", "list", "tuple", "by model", "by name", "two for one"],
)
def test_optimizers_are_named_after_what_they_train(
    tmp_path: Path, make: Any, names: list[str]
) -> None:
    trainer = prepared(tmp_path, with_optimizers(make))
    assert list(trainer.named_optimizers()) == names
    for name, optimizer in trainer.named_optimizers().items():
        assert trainer.get_name_by_optimizer(optimizer) == name
        assert trainer.get_name_by_optimizer(unwrap(optimizer)) == name


def test_schedulers_belong_to_their_optimizers_however_they_are_returned(tmp_path: Path) -> None:
    class Scheduled(TwoModels):
        def configure_optimizers(self) -> Any:
            return [SGD(self.net.parameters()), SGD(self.head.parameters())]

        def configure_schedulers(self) -> Any:
            made = self.named_optimizers()
            return {"any": StepLR(made["head"], 1), "name": StepLR(made["net"], 2)}

    trainer = prepared(tmp_path, Scheduled)
    assert list(trainer.named_schedulers()) == ["head", "net"]
    for name, optimizer in trainer.named_optimizers().items():
        found = trainer.get_scheduler_from_optimizer(optimizer)
        assert found is trainer.named_schedulers()[name]


def test_attributes_hold_what_runs_and_named_models_what_was_made(tmp_path: Path) -> None:
    class Keeps(TinyTrainer):
        def configure_optimizers(self) -> Any:
            self.optimizer = super().configure_optimizers()
            return self.optimizer

    trainer = prepared(tmp_path, Keeps)
    assert type(trainer.named_models()["net"]) is nn.Sequential
    assert trainer.net is not trainer.named_models()["net"]
    assert unwrap(trainer.net) is trainer.named_models()["net"]
    assert trainer.optimizer is trainer.named_optimizers()["net"]
    assert trainer.get_module("net.3") is trainer.named_models()["net"][3]
    assert isinstance(trainer.train_dataloader, ResumableLoader)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nest", "no model 'nest' in 'nest'; there is: net"),
        ("net.7.weight", "no module '7' in net; there is: 0, 1, 2, 3"),
        ("net.0.weight", "no module 'weight' in net.0; there is: none"),
    ],
)
def test_an_unknown_module_path_names_what_exists(tmp_path: Path, path: str, message: str) -> None:
    trainer = prepared(tmp_path, TinyTrainer)
    with pytest.raises(UnknownComponentError) as caught:
        trainer.get_module(path)
    assert str(caught.value) == message


@pytest.mark.parametrize("hide", [lambda m: [m], lambda m: (m, 1), lambda m: {"a": m}])
def test_modules_hidden_in_a_plain_container_are_refused(tmp_path: Path, hide: Any) -> None:
    class Hidden(TinyTrainer):
        def configure_models(self) -> None:
            super().configure_models()
            self.parts = hide(nn.Linear(1, 1))

    with pytest.raises(ConfigError, match=r"self.parts is a .* of modules, which would not be"):
        prepared(tmp_path, Hidden)


def test_a_trainer_without_a_model_is_refused(tmp_path: Path) -> None:
    class Empty(TinyTrainer):
        def configure_models(self) -> None:
            self.width = 3

    with pytest.raises(ConfigError, match="configure_models: it assigned no module to self"):
        prepared(tmp_path, Empty)


def test_parameters_that_no_optimizer_trains_are_named_in_a_warning(tmp_path: Path) -> None:
    kind = with_optimizers(lambda t: SGD(t.net.parameters()))
    with pytest.warns(UserWarning, match=r"no optimizer trains head.weight, head.bias. Add"):
        prepared(tmp_path, kind)


def test_frozen_parameters_need_no_optimizer(tmp_path: Path) -> None:
    class Frozen(TwoModels):
        def configure_models(self) -> None:
            super().configure_models()
            self.head.requires_grad_(False)

        def configure_optimizers(self) -> Any:
            return SGD(self.net.parameters())

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer = prepared(tmp_path, Frozen, n_epochs=1)
    head = trainer.named_models()["head"].weight.clone()
    trainer.fit()
    assert torch.equal(trainer.named_models()["head"].weight, head)


def test_what_is_no_optimizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="configure_optimizers: it returned a Linear"):
        prepared(tmp_path, with_optimizers(lambda t: nn.Linear(1, 1)))


def test_reduce_on_plateau_is_refused_with_advice(tmp_path: Path) -> None:
    class Plateau(TinyTrainer):
        def configure_schedulers(self) -> Any:
            return ReduceLROnPlateau(self.named_optimizers()["net"])

    with pytest.raises(ConfigError, match="ReduceLROnPlateau looks for a plateau") as e:
        prepared(tmp_path, Plateau)
    assert 'Schedule(scheduler, every="validation", monitor="val/loss")' in e.value.next_move


def test_two_schedulers_of_one_optimizer_are_refused(tmp_path: Path) -> None:
    class Two(TinyTrainer):
        def configure_schedulers(self) -> Any:
            (optimizer,) = self.named_optimizers().values()
            return [StepLR(optimizer, 1), StepLR(optimizer, 2)]

    with pytest.raises(ConfigError, match="optimizer net has several schedulers"):
        prepared(tmp_path, Two)


def test_the_train_loader_alone_is_enough(tmp_path: Path) -> None:
    class Alone(TinyTrainer):
        def configure_dataloaders(self) -> Any:
            return super().configure_dataloaders()[0]

    trainer = prepared(tmp_path, Alone, n_epochs=1)
    assert trainer.val_dataloader is None
    trainer.fit()
    assert trainer.global_step == 6


def test_a_trainer_without_steps_says_what_to_write(tmp_path: Path) -> None:
    class Nothing(TinyTrainer):
        compute_loss = DreamTrainer.compute_loss

    with pytest.raises(NotImplementedError, match="has neither compute_loss nor training_step"):
        tiny(tmp_path, Nothing, enable=False).fit()


def test_init_weights_runs_after_the_models_are_made(tmp_path: Path) -> None:
    class Initialised(TinyTrainer):
        def init_weights(self) -> None:
            nn.init.constant_(self.net[0].weight, 0.5)

    trainer = prepared(tmp_path, Initialised)
    assert bool((trainer.named_models()["net"][0].weight == 0.5).all())


def test_compute_loss_may_return_other_scalars_to_log(tmp_path: Path) -> None:
    import json

    class Logs(TinyTrainer):
        def compute_loss(self, batch: Any, batch_idx: int) -> Any:
            loss = super().compute_loss(batch, batch_idx)
            return {"loss": loss, "weight": 2, "twice": 2 * loss, "not": "a number"}

    trainer = tiny(tmp_path, Logs, n_epochs=1, track_grad_norm=True)
    trainer.fit()
    lines = (trainer.run_directory / "metrics.jsonl").read_text().splitlines()
    first, last = json.loads(lines[0]), json.loads(lines[-1])
    assert set(first) == {
        *("step", "epoch", "lr/net"),
        *("train/loss", "train/twice", "train/grad_norm"),
    }
    assert first["train/twice"] == 2 * first["train/loss"]
    assert set(last) == {"step", "epoch", "val/loss", "val/twice"}


def test_policies_are_applied_to_each_model(tmp_path: Path) -> None:
    applied = []

    class Policies(TwoModels):
        def configure_optimizers(self) -> Any:
            return SGD([*self.net.parameters(), *self.head.parameters()])

        def apply_activation_checkpointing(self, model: nn.Module) -> None:
            applied.append(("checkpointing", type(model)))

        def apply_compile(self, model: nn.Module) -> None:
            applied.append(("compile", type(model)))

    prepared(tmp_path, Policies, compile_model=True, checkpoint_activations=True)
    assert applied == [
        ("checkpointing", nn.Sequential),
        ("compile", nn.Sequential),
        ("checkpointing", nn.Linear),
        ("compile", nn.Linear),
    ]


def test_activation_checkpointing_does_not_change_names_or_results(tmp_path: Path) -> None:
    class Blocks(TinyTrainer):
        def configure_models(self) -> None:
            class Net(nn.Module):
                def __init__(self) -> None:
                    super().__init__()
                    self.blocks = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))

                def forward(self, x: Any) -> Any:
                    for block in self.blocks:
                        x = block(x).tanh()
                    return x.sum(1, keepdim=True)

            self.net = Net()

    states = []
    for activations in (False, True):
        trainer = tiny(
            tmp_path, Blocks, n_epochs=1, checkpoint_activations=activations, enable=False
        )
        trainer.fit()
        states.append(trainer.state_dict()["models"]["net"])
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(a, b) for a, b in zip(*(s.values() for s in states), strict=True))


@pytest.mark.parametrize("returned", [None, "a", (1, 2, 3), {"train": [], "val": []}])
def test_what_is_no_loader_is_refused_by_the_method_that_returned_it(
    tmp_path: Path, returned: Any
) -> None:
    class Wrong(TinyTrainer):
        def configure_dataloaders(self) -> Any:
            return returned if returned != "a" else (None, None)

    with pytest.raises(ConfigError, match="configure_dataloaders"):
        tiny(tmp_path, Wrong).fit()


@pytest.mark.parametrize("returned", [None, {"nll": 1.0}, (1.0, 2.0)])
def test_what_is_no_loss_is_named(tmp_path: Path, returned: Any) -> None:
    class Wrong(TinyTrainer):
        def compute_loss(self, batch: Any, batch_idx: int) -> Any:
            return returned

    with pytest.raises(TypeError, match="compute_loss returned"):
        tiny(tmp_path, Wrong).fit()


def test_a_training_step_that_never_steps_is_an_error(tmp_path: Path) -> None:
    class Lightning(TinyTrainer):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.compute_loss(batch, batch_idx)

    with pytest.raises(RuntimeError, match="took no optimizer step in a whole epoch"):
        tiny(tmp_path, Lightning).fit()


def test_a_parameter_outside_every_model_is_refused(tmp_path: Path) -> None:
    class Loose(TinyTrainer):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([*self.net.parameters(), torch.nn.Parameter(torch.ones(3))])

    with pytest.raises(ConfigError, match=r"shape \(3,\) that is in no model"):
        tiny(tmp_path, Loose).fit()


def test_kinds_of_the_configuration_are_checked_together() -> None:
    with pytest.raises(ConfigError) as caught:
        DreamTrainerConfig(callbacks=[], loggers={"a": "csv"}, training_parameters={})  # type: ignore[arg-type]
    assert [problem.partition(" ")[0] for problem in caught.value.problems] == [
        "training_parameters",
        "callbacks",
        "loggers.a",
    ]


def test_a_root_that_cannot_be_written_is_refused_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="root_dir"):
        tiny(tmp_path / "file").fit()
    assert (tmp_path / "file").read_text() == "mine"


def test_a_trainer_moves_batches_in_its_own_way(tmp_path: Path) -> None:
    phases: list[bool] = []

    class Moving(TinyTrainer):
        def batch_to_device(self, batch: Any) -> Any:
            phases.append(self.loop.is_evaluating)
            return {**super().batch_to_device(batch), "moved": True}

        def compute_loss(self, batch: Any, batch_idx: int) -> Any:
            assert batch["moved"]
            return super().compute_loss(batch, batch_idx)

    tiny(tmp_path, Moving, enable=False, n_epochs=1).fit()
    assert phases == [False] * 6 + [True] * 3
