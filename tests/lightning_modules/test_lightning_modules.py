"""A LightningModule runs here as it runs under Lightning, and resumes to the bit."""

from __future__ import annotations

import inspect
import json
import logging
import os
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import torchmetrics
from lightning.pytorch.loggers import CSVLogger
from modules import KINDS, Adversarial, Averaged, Plain, Random, config, points, trained
from support import differences, exact_state, run_ranks
from torch import nn
from torch.utils.data import DataLoader

from dream_trainer import export_checkpoint, verify_resume
from dream_trainer.coordination import Interrupted
from dream_trainer.errors import ConfigError
from dream_trainer.lightning_modules import LightningModuleTrainer

pytestmark = pytest.mark.may_leave("rng")  # of Lightning's own runs


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Lightning has advice for every run."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [one.level for one in loggers]
    for one in loggers:
        one.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        yield
    for one, level in zip(loggers, levels, strict=True):
        one.setLevel(level)


def by_lightning(module: lightning.LightningModule, **options: Any) -> lightning.Trainer:
    defaults = {
        "max_epochs": 3,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    trainer = lightning.Trainer(**defaults | options)
    trainer.fit(module)
    return trainer


def bits(module: nn.Module) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("name", KINDS)
def test_the_weights_are_those_of_lightnings_trainer(tmp_path: Path, name: str) -> None:
    theirs = KINDS[name]()
    by_lightning(theirs)
    trainer = trained(tmp_path, KINDS[name], checkpoints={"enable": False})
    assert bits(trainer.module) == bits(theirs)
    assert trainer.global_step == {"EverySecondBatch": 9, "SkipsBatches": 12}.get(name, 18)


@pytest.mark.parametrize(
    ("here", "there"),
    [
        ({"gradient_clip_val": 0.05}, {"gradient_clip_val": 0.05}),
        ({"gradient_accumulation_steps": 2}, {"accumulate_grad_batches": 2}),
        ({"val_every_n_epochs": 2}, {"check_val_every_n_epoch": 2}),
    ],
    ids=str,
)
def test_options_of_the_run_mean_the_same(
    tmp_path: Path, here: dict[str, Any], there: dict[str, Any]
) -> None:
    theirs = Plain()
    by_lightning(theirs, **there)
    trainer = trained(tmp_path, Plain, training=here, checkpoints={"enable": False})
    assert bits(trainer.module) == bits(theirs)


HOOKS = """
    setup on_fit_start on_train_start on_train_epoch_start on_train_batch_start training_step
    on_before_backward backward on_after_backward on_before_optimizer_step on_before_zero_grad
    configure_gradient_clipping optimizer_step lr_scheduler_step on_train_batch_end
    on_validation_start on_validation_epoch_start on_validation_batch_start validation_step
    on_validation_batch_end on_validation_epoch_end on_validation_end on_train_epoch_end
    on_train_end on_fit_end teardown on_before_batch_transfer transfer_batch_to_device
    on_after_batch_transfer configure_optimizers train_dataloader val_dataloader
    on_test_start on_test_epoch_start on_test_batch_start on_test_batch_end on_test_epoch_end
    on_test_end test_step test_dataloader
""".split()


def recording(calls: list[str]) -> type[Plain]:
    """A module that has every hook of its own, and writes down when it is called."""

    def recorded(name: str) -> Any:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            if name == "test_step":
                return None
            return getattr(KINDS["EverySecondEpoch"], name)(self, *args, **kwargs)

        call.__signature__ = inspect.signature(getattr(Plain, name))  # type: ignore[attr-defined]
        return call

    members = {name: recorded(name) for name in HOOKS}
    members["test_dataloader"] = Plain.val_dataloader
    return type("Recording", (KINDS["EverySecondEpoch"],), members)


def test_the_hooks_are_called_in_lightnings_order(tmp_path: Path) -> None:
    theirs: list[str] = []
    options = {"max_epochs": 2, "num_sanity_val_steps": 1}
    module = recording(theirs)()
    by_lightning(module, **options).test(module, verbose=False)
    ours: list[str] = []
    training = {"n_epochs": 2, "num_sanity_val_steps": 1}
    trainer = LightningModuleTrainer(
        config(tmp_path, training=training, checkpoints={"enable": False}), recording(ours)()
    )
    trainer.fit()
    trainer.test()

    def without(calls: list[str], *names: str) -> list[str]:
        return [name for name in calls if name not in names]

    # Loaders are made before optimizers, and gradients are zeroed after a step, not before the
    # next backward; on_train_start comes before the sanity check.
    moved = ("train_dataloader", "val_dataloader", "configure_optimizers", "on_before_zero_grad")
    moved = (*moved, "on_train_start", "setup")
    assert without(ours, *moved) == without(theirs, *moved)
    assert sorted(without(ours, "setup")) == sorted(without(theirs, "setup"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", [Random, KINDS["Plateau"], KINDS["StepPlateau"], Averaged, Adversarial]
)
def test_a_killed_run_goes_on_to_the_bit(tmp_path: Path, kind: type[Plain]) -> None:
    def make(given: Any) -> LightningModuleTrainer:
        return LightningModuleTrainer(given, kind())

    training = {"n_epochs": 3, "num_sanity_val_steps": 1}
    report = verify_resume(make, config(tmp_path, training=training), steps=14, every=5, tell=None)
    assert report.is_exact, str(report)


def test_a_run_killed_in_a_step_goes_on_to_the_bit(tmp_path: Path) -> None:
    class Killed(Random):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if self.global_step == 10 and os.environ.get("KILLED") == "yes":
                os.kill(os.getpid(), signal.SIGKILL)

    options: dict[str, Any] = {"checkpoints": {"every_n_steps": 3, "async_save": False}}
    whole = trained(tmp_path, Killed, name="whole", **options)
    if (child := os.fork()) == 0:
        os.environ["KILLED"] = "yes"
        trained(tmp_path, Killed, name="killed", **options)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    rest = trained(tmp_path, Killed, name="killed", **options)
    assert rest.is_resumed
    assert differences(exact_state(whole), exact_state(rest)) == []
    logs = [(one.run_directory / "metrics.jsonl").read_bytes() for one in (whole, rest)]
    assert logs[0] == logs[1]


class Pressing(Random):
    """Ctrl-C in a batch of the second epoch."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (self.current_epoch, batch_idx) == (1, 2) and self.global_rank == 0:
            os.kill(os.getpid(), signal.SIGINT)

    def train_dataloader(self) -> Any:
        return DataLoader(points(1), batch_size=4, shuffle=True, num_workers=2)


class WithWorkers(Pressing):
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None: ...


def test_a_run_goes_on_inside_an_accumulation_window_with_workers(tmp_path: Path) -> None:
    options: dict[str, Any] = {"training": {"gradient_accumulation_steps": 4}}
    whole = trained(tmp_path, WithWorkers, name="whole", **options)
    with pytest.raises(Interrupted):
        trained(tmp_path, Pressing, name="parts", **options)
    rest = trained(tmp_path, WithWorkers, name="parts", **options)
    assert rest.is_resumed
    assert differences(exact_state(whole), exact_state(rest)) == []
    logs = [(one.run_directory / "metrics.jsonl").read_bytes() for one in (whole, rest)]
    assert logs[0] == logs[1]


def on_ranks(root: Path, name: str, devices: dict[str, Any]) -> dict[str, Any]:
    kind = Pressing if name == "interrupted" else WithWorkers
    run = "whole" if name == "whole" else "parts"
    if name == "interrupted":
        with pytest.raises(Interrupted):
            trained(root, kind, name=run, devices=devices)
        return {}
    trainer = trained(root, kind, name=run, devices=devices)
    assert trainer.is_resumed == (name == "resumed")
    return exact_state(trainer)


@pytest.mark.distributed
@pytest.mark.parametrize(
    "devices", [{"strategy": "ddp", "devices": 2}, {"dp_shard": 2, "devices": 2}], ids=str
)
def test_ranks_go_on_to_the_bit(tmp_path: Path, devices: dict[str, Any]) -> None:
    whole = run_ranks(2, on_ranks, tmp_path, "whole", devices)
    run_ranks(2, on_ranks, tmp_path, "interrupted", devices)
    rest = run_ranks(2, on_ranks, tmp_path, "resumed", devices)
    for one, other in zip(whole, rest, strict=True):
        assert differences(one, other) == []


class Swapped(Averaged):
    """Validated with the average of its weights."""

    def on_validation_epoch_start(self) -> None:
        self.own = [parameter.detach().clone() for parameter in self.parameters()]
        self.put(getattr(self, "average", self.own))

    def on_validation_epoch_end(self) -> None:
        self.put(self.own)

    def put(self, values: Any) -> None:
        with torch.no_grad():
            for parameter, value in zip(self.parameters(), values, strict=True):
                parameter.copy_(value)


def test_ctrl_c_in_a_validation_saves_the_weights_and_not_their_average(tmp_path: Path) -> None:
    class Interrupting(Swapped):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            if self.trainer.global_step == 6 and batch_idx == 1:
                os.kill(os.getpid(), signal.SIGINT)

    whole = trained(tmp_path, Swapped, name="whole")
    with pytest.raises(Interrupted):
        trained(tmp_path, Interrupting, name="parts")
    rest = trained(tmp_path, Swapped, name="parts")
    assert rest.is_resumed
    assert differences(exact_state(whole), exact_state(rest)) == []


class Counting(Plain):
    """Counts samples of each phase in torchmetrics, logged in every way."""

    def __init__(self) -> None:
        super().__init__()
        self.in_epoch, self.in_step = torchmetrics.SumMetric(), torchmetrics.SumMetric()
        self.at_end, self.in_val = torchmetrics.SumMetric(), torchmetrics.SumMetric()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        for metric in (self.in_epoch, self.in_step, self.at_end):
            metric(len(batch[0]))
        self.log("in_epoch", self.in_epoch, on_step=False, on_epoch=True)
        self.log("in_step", self.in_step)
        return super().training_step(batch, batch_idx)

    def on_train_epoch_end(self) -> None:
        self.log("at_end", self.at_end)
        self.at_end.reset()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.in_val(len(batch[0]))
        self.log("in_val", self.in_val)

    test_step = validation_step


def test_metrics_of_the_module_count_each_phase_once(tmp_path: Path) -> None:
    trainer = trained(tmp_path, Counting, name="whole")
    found = {
        name: [row[name] for row in rows(trainer) if name in row]
        for name in ("in_epoch", "at_end", "in_val")
    }
    assert found == {"in_epoch": [24] * 3, "at_end": [24] * 3, "in_val": [10] * 3}
    assert trainer.test(DataLoader(points(3, 8), batch_size=4)) == {"in_val": 8}
    trained(tmp_path, Counting, name="parts", training={"n_epochs": 2})
    rest = trained(tmp_path, Counting, name="parts")
    assert [row["in_val"] for row in rows(rest) if "in_val" in row] == [10] * 3
    assert trainer.module.in_step.compute() == rest.module.in_step.compute()


def test_checkpoint_hooks_see_the_trainer_also_after_the_run(tmp_path: Path) -> None:
    class Telling(Plain):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["seen"] = self.trainer.current_epoch

    trainer = trained(tmp_path, Telling)
    state = trainer.state_dict()
    assert state["callbacks"]["lightning_module"]["module"] == {"seen": 3}


def plateau_on_ranks(root: Path) -> list[Any]:
    devices = {"strategy": "ddp", "devices": 2}
    trainer = trained(root, StepPlateauOfTwo, devices=devices, checkpoints={"enable": False})
    (optimizer,) = trainer.named_optimizers().values()
    return [bits(trainer.module), optimizer.param_groups[0]["lr"]]


class StepPlateauOfTwo(KINDS["StepPlateau"]):  # type: ignore[misc]
    def train_dataloader(self) -> Any:
        return DataLoader(points(1), batch_size=2)


@pytest.mark.distributed
def test_ranks_agree_on_what_a_scheduler_monitors(tmp_path: Path) -> None:
    one, other = run_ranks(2, plateau_on_ranks, tmp_path)
    assert one == other
    assert one[1] < 0.5


@pytest.mark.distributed
def test_a_module_with_manual_optimization_lets_go_of_its_group(tmp_path: Path) -> None:
    def rank() -> bool:
        devices = {"strategy": UNUSED, "devices": 2}
        trainer = LightningModuleTrainer(config(tmp_path, devices=devices), AdversarialOfTwo())
        with trainer:
            trainer.fit()
        return torch.distributed.is_initialized()

    assert run_ranks(2, rank) == [False, False]


def rows(trainer: LightningModuleTrainer) -> list[dict[str, Any]]:
    text = (trainer.run_directory / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_what_is_logged_has_lightnings_names_and_means(tmp_path: Path) -> None:
    class Logging(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            number = float(batch_idx)
            self.log("step", number)  # in the row the counter has that name
            self.log("both", number, on_step=True, on_epoch=True)
            self.log("epoch", number, on_step=False, on_epoch=True, batch_size=batch_idx)
            self.log("sum", number, on_step=False, on_epoch=True, reduce_fx="sum")
            self.log("least", number + 1, on_step=False, on_epoch=True, reduce_fx=torch.min)
            self.log("hidden", number, logger=False)
            return self.loss(batch)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log_dict({"val_mean": float(batch_idx), "val_size": len(batch[0])})

        def on_validation_epoch_end(self) -> None:
            self.log("val_end", 5.0)

        def on_train_epoch_end(self) -> None:
            self.log("end", self.trainer.callback_metrics["val_end"] + 1)

    trainer = trained(tmp_path, Logging, training={"n_epochs": 1})
    found: dict[str, list[float]] = {}
    for row in rows(trainer):
        for name, value in row.items():
            found.setdefault(name, []).append(value)
    assert found["step"][:6] == [1, 2, 3, 4, 5, 6]
    assert found["module/step"] == [0, 1, 2, 3, 4, 5]
    assert found["both_step"] == [0, 1, 2, 3, 4, 5]
    assert found["both_epoch"] == [2.5]
    # Weights of 0 to 5.
    assert found["module/epoch"] == [(0 + 1 + 4 + 9 + 16 + 25) / 15]
    assert (found["sum"], found["least"]) == ([15], [1])
    assert "hidden" not in found
    # Batches of 4, 4 and 2 samples.
    assert found["val_mean"] == [(4 * 0 + 4 * 1 + 2 * 2) / 10]
    assert found["val_size"] == [(4 * 4 + 4 * 4 + 2 * 2) / 10]
    assert (found["val_end"], found["end"]) == ([5], [6])
    assert trainer.callback_metrics()["both"].item() == 2.5


def test_the_module_is_left_as_it_was(tmp_path: Path) -> None:
    module = Plain()
    before = {name: value for name, value in vars(module).items() if name != "training"}
    LightningModuleTrainer(config(tmp_path), module).fit()
    after = {name: value for name, value in vars(module).items() if name != "training"}
    assert after.keys() == before.keys()
    assert [name for name in before if after[name] != before[name]] == []


def ranks(root: Path, kind: type[Plain], devices: dict[str, Any]) -> dict[str, Any]:
    torch.set_default_dtype(torch.float64)
    options: dict[str, Any] = {"devices": devices, "checkpoints": {"enable": False}}
    trainer = trained(root, kind, **options)
    weights = {
        name: (value.full_tensor() if hasattr(value, "full_tensor") else value)
        for name, value in trainer.module.state_dict().items()
    }
    latest = {name: float(value) for name, value in trainer.callback_metrics().items()}
    return {"weights": weights, "latest": latest, "step": trainer.global_step}


class OfTwo(Plain):
    def train_dataloader(self) -> Any:
        return DataLoader(points(1), batch_size=2)


UNUSED = "ddp_find_unused_parameters_true"


class AdversarialOfTwo(Adversarial):
    train_dataloader = OfTwo.train_dataloader


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("kind", "one", "devices"),
    [
        (OfTwo, Plain, {"strategy": "ddp", "devices": 2}),
        (OfTwo, Plain, {"dp_shard": 2, "devices": 2}),
        (AdversarialOfTwo, Adversarial, {"strategy": UNUSED, "devices": 2}),
    ],
    ids=["ddp", "fsdp", "manual-ddp"],
)
def test_ranks_train_what_one_device_trains(
    tmp_path: Path, kind: type[Plain], one: type[Plain], devices: dict[str, Any]
) -> None:
    (expected,) = run_ranks(1, ranks, tmp_path, one, {})
    both = run_ranks(2, ranks, tmp_path, kind, devices)
    assert both[0]["latest"]["val_loss"] == both[1]["latest"]["val_loss"]
    for rank in both:
        assert rank["step"] == expected["step"]
        for name, value in expected["weights"].items():
            assert (
                rank["weights"][name].numpy().tobytes()
                == both[0]["weights"][name].numpy().tobytes()
            )
            # Sums of two halves round differently from those of four.
            torch.testing.assert_close(rank["weights"][name], value, rtol=1e-9, atol=1e-12)


def test_everything_that_is_not_supported_is_named_at_once(tmp_path: Path) -> None:
    class Unsupported(Plain):
        def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None: ...

        def configure_callbacks(self) -> Any:
            return [lightning.Callback()]

        def on_validation_model_eval(self) -> None: ...

    with pytest.raises(ConfigError) as caught:
        LightningModuleTrainer(config(tmp_path), Unsupported())
    text = str(caught.value)
    for name in ("optimizer_zero_grad", "configure_callbacks", "on_validation_model_eval"):
        assert name in text
    assert not (tmp_path / "default").exists()


def test_methods_that_are_no_hooks_may_be_overridden(tmp_path: Path) -> None:
    class Freezing(Plain):
        def train(self, mode: bool = True) -> Any:
            super().train(mode)
            self.net[0].eval()
            return self

        def print(self, *args: Any, **kwargs: Any) -> None: ...

        @classmethod
        def load_from_checkpoint(cls, *args: Any, **kwargs: Any) -> Any: ...

    assert trained(tmp_path, Freezing).global_step == 18


def test_what_the_configuration_cannot_do_to_a_module_is_named(tmp_path: Path) -> None:
    class OddData(Data):
        def load_from_checkpoint(self, *args: Any, **kwargs: Any) -> Any: ...

    devices = {"compile_model": True, "checkpoint_activations": True}
    with pytest.raises(ConfigError) as caught:
        LightningModuleTrainer(config(tmp_path, devices=devices), Plain(), OddData())
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        "device_parameters.compile_model",
        "device_parameters.checkpoint_activations",
    ]


@pytest.mark.distributed
def test_a_notebook_gets_the_module_back_from_its_ranks(tmp_path: Path) -> None:
    devices = {"strategy": "ddp_fork", "devices": 2}
    trainer = LightningModuleTrainer(config(tmp_path, devices=devices), OfTwo())
    trainer.fit()
    assert trainer.global_step == 18
    whole = trained(tmp_path, Plain, name="one").callback_metrics()["val_loss"].item()
    assert trainer.callback_metrics()["val_loss"].item() == pytest.approx(whole, rel=1e-4)


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.1)


def step_lr(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, 1)


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda m: [sgd(m), sgd(m)], "several need automatic_optimization=False"),
        (lambda m: torch.optim.LBFGS(m.parameters()), "evaluates its closure several times"),
        (lambda m: {"optimizer": sgd(m), "scheduler": 1}, "its dict has 'scheduler'"),
        (lambda m: {"lr_scheduler": 1}, "its dict has no 'optimizer'"),
        (lambda m: "adam", "it returned a str"),
        (lambda m: ([sgd(m)], ["cosine"]), "it returned a str as a scheduler"),
        (
            lambda m: ([o := sgd(m)], [{"scheduler": step_lr(o), "interval": "batch"}]),
            "interval='batch'",
        ),
        (
            lambda m: ([o := sgd(m)], [{"scheduler": step_lr(o), "every": 2}]),
            "a scheduler's dict has 'every'",
        ),
        (
            lambda m: ([o := sgd(m)], [torch.optim.lr_scheduler.ReduceLROnPlateau(o)]),
            'no "monitor" says in which value',
        ),
    ],
)
def test_a_wrong_configure_optimizers_is_told(tmp_path: Path, make: Any, problem: str) -> None:
    kind = type("Wrong", (Plain,), {"configure_optimizers": lambda self: make(self)})
    with pytest.raises(ConfigError, match=problem.replace("(", r"\(")):
        LightningModuleTrainer(config(tmp_path), kind()).fit()


@pytest.mark.parametrize(
    "make",
    [
        lambda m: sgd(m),
        lambda m: [sgd(m)],
        lambda m: {"optimizer": sgd(m)},
        lambda m: [{"optimizer": sgd(m)}],
        lambda m: ([o := sgd(m)], [step_lr(o)]),
        lambda m: ([o := sgd(m)], step_lr(o)),
        lambda m: {"optimizer": (o := sgd(m)), "lr_scheduler": step_lr(o)},
        lambda m: {"optimizer": (o := sgd(m)), "lr_scheduler": {"scheduler": step_lr(o)}},
        lambda m: None,
    ],
)
def test_every_documented_form_of_configure_optimizers_trains(tmp_path: Path, make: Any) -> None:
    kind = type("Right", (Plain,), {"configure_optimizers": lambda self: make(self)})
    theirs = kind()
    by_lightning(theirs)
    trainer = trained(tmp_path, kind, checkpoints={"enable": False})
    assert bits(trainer.module) == bits(theirs)


def test_a_monitor_that_was_not_logged_is_named_with_those_that_were(tmp_path: Path) -> None:
    class Misspelled(Plain):
        def configure_optimizers(self) -> Any:
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer := sgd(self))
            return {"optimizer": optimizer, "lr_scheduler": plateau, "monitor": "val_los"}

    with pytest.raises(ConfigError, match=r"monitor='val_los'(?s:.*)val_loss"):
        trained(tmp_path, Misspelled)


class Data(lightning.LightningDataModule):
    def __init__(self, batch_size: int = 4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.calls: list[str] = []

    def prepare_data(self) -> None:
        self.calls.append("prepare_data")

    def setup(self, stage: str) -> None:
        self.calls.append(f"setup {stage}")
        self.seen = 0

    def train_dataloader(self) -> Any:
        return DataLoader(points(1), batch_size=self.hparams.batch_size)

    def val_dataloader(self) -> Any:
        return [DataLoader(points(2, 10), batch_size=4)]

    def predict_dataloader(self) -> Any:
        return DataLoader(points(4, 6), batch_size=4)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.seen += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seen = state_dict["seen"]

    def teardown(self, stage: str) -> None:
        self.calls.append(f"teardown {stage}")


def test_a_data_module_brings_the_data_and_keeps_its_state(tmp_path: Path) -> None:
    class Predicting(Plain):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return self(batch[0])

    data = Data()
    trainer = LightningModuleTrainer(config(tmp_path), Predicting(), data)
    trainer.fit()
    assert data.calls == ["prepare_data", "setup fit", "teardown fit"]
    assert data.seen == 3 * (6 + 3)
    assert [len(part) for part in trainer.predict()] == [4, 2]
    assert data.calls[3:] == ["setup predict", "teardown predict"]
    again = Data()
    other = LightningModuleTrainer(config(tmp_path), Predicting(), again)
    other.validate()
    assert again.seen == 3 * (6 + 3) + 3


def test_hyperparameters_go_to_the_loggers(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="csv", version="one")
    trainer = LightningModuleTrainer(
        config(tmp_path, loggers={"csv": logger}), Plain(width=5), Data(batch_size=6)
    )
    trainer.fit()
    written = (tmp_path / "csv" / "one" / "hparams.yaml").read_text(encoding="utf-8")
    assert {"batch_size: 6", "lr: 0.1", "width: 5"} <= set(written.splitlines())
    assert "training_parameters.n_epochs: " in written


def test_lightning_loads_what_was_trained_here_and_the_other_way_round(tmp_path: Path) -> None:
    trainer = LightningModuleTrainer(config(tmp_path), Plain(width=5))
    trainer.fit()
    file = export_checkpoint(trainer.run_directory, tmp_path / "one.ckpt")
    loaded = Plain.load_from_checkpoint(file)
    assert loaded.hparams == {"width": 5, "lr": 0.1}
    assert bits(loaded) == bits(trainer.module)

    theirs = Plain(width=5)
    by_lightning(theirs, max_epochs=1).save_checkpoint(tmp_path / "two.ckpt")
    warm = config(tmp_path, "warm", checkpoints={"init_from": str(tmp_path / "two.ckpt")})
    started = LightningModuleTrainer(warm, Plain(width=5))
    started.validate()
    assert bits(started.module) == bits(theirs)


def test_what_a_module_cannot_read_of_the_trainer_is_said_with_what_it_can(tmp_path: Path) -> None:
    class Asking(Plain):
        def on_fit_start(self) -> None:
            self.trainer.fit_loop  # noqa: B018

    with pytest.raises(AttributeError, match=r"self.trainer.fit_loop(?s:.*)current_epoch"):
        trained(tmp_path, Asking)


def test_it_stops_when_the_module_says(tmp_path: Path) -> None:
    class Stopping(Plain):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if self.global_step == 4:
                self.trainer.should_stop = True

    assert trained(tmp_path, Stopping).global_step == 4


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"name": "x", "value": torch.ones(2)}, "has shape"),
        ({"name": "x", "value": "text"}, "a str is no number"),
        ({"name": "x", "value": 1.0, "on_epoch": True, "reduce_fx": "median"}, "reduce_fx"),
        ({"name": "x", "value": 1.0, "sync_dist_group": object()}, "sync_dist_group"),
    ],
)
def test_what_cannot_be_logged_is_told(tmp_path: Path, arguments: Any, problem: str) -> None:
    class Wrong(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log(**arguments)

    with pytest.raises(ValueError, match=problem):
        trained(tmp_path, Wrong)


def test_a_module_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no LightningModule"):
        LightningModuleTrainer(config(tmp_path), nn.Linear(1, 1))
    with pytest.raises(ConfigError, match=r"pass an instance: Plain\(\.\.\.\)"):
        LightningModuleTrainer(config(tmp_path), Plain)
    with pytest.raises(ConfigError, match="a loader is passed by name"):
        LightningModuleTrainer(config(tmp_path), Plain(), DataLoader(points(1)))
