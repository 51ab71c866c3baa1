"""What people use beside a trainer works with this one, and a run with it resumes exactly."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torchmetrics
from support import TinyTrainer, differences, exact_state, run_ranks, tiny, tiny_config
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from dream_trainer import Callback, Histograms, ResumableRun
from dream_trainer.coordination import Interrupted
from dream_trainer.errors import StateError

pytestmark = pytest.mark.may_leave("rng", "environment", "thread")


def need(name: str, install: str = "") -> Any:
    return pytest.importorskip(name, reason=f"pip install {install or name}")


class StopAt(Callback):
    """Ctrl-C after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def post_train_step(self, trainer: Any, result: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            raise_interrupt()


def raise_interrupt() -> None:
    import os
    import signal

    os.kill(os.getpid(), signal.SIGINT)


def assert_resumes(
    root: Path, kind: type[TinyTrainer], stop_at: int = 8, **options: Any
) -> tuple[Any, Any]:
    """Two runs that end alike: one that is never interrupted, one that is and goes on."""
    whole = tiny(root, kind, experiment="whole", **options)
    whole.fit()
    with pytest.raises(Interrupted):
        tiny(root, kind, experiment="parts", callbacks={"stop": StopAt(stop_at)}, **options).fit()
    rest = tiny(root, kind, experiment="parts", callbacks={"stop": StopAt(0)}, **options)
    rest.fit()
    assert rest.is_resumed
    assert differences(exact_state(whole), exact_state(rest)) == []
    logs = [(one.run_directory / "metrics.jsonl").read_bytes() for one in (whole, rest)]
    assert logs[0] == logs[1]
    return whole, rest


# ---------------------------------------------------------------------- torch and torchmetrics


class WithMetrics(TinyTrainer):
    def configure_metrics(self) -> None:
        self.errors = torchmetrics.MetricCollection(
            {"mse": torchmetrics.MeanSquaredError(), "mae": torchmetrics.MeanAbsoluteError()}
        )

    def compute_loss(self, batch: Any, batch_idx: int) -> Any:
        predicted = self.net(batch["x"])
        self.errors.update(predicted, batch["y"])
        return (predicted - batch["y"]).square().mean()


def test_torchmetrics_go_on_inside_an_epoch(tmp_path: Path) -> None:
    whole, _ = assert_resumes(tmp_path, WithMetrics)
    rows = (whole.run_directory / "metrics.jsonl").read_text(encoding="utf-8")
    assert "train/errors/mae" in rows
    assert "val/errors/mse" in rows


class Compiled(TinyTrainer):
    def configure_models(self) -> None:
        super().configure_models()
        self.net = torch.compile(self.net, backend="aot_eager")


class CompiledInPlace(TinyTrainer):
    def configure_models(self) -> None:
        super().configure_models()
        self.net.compile(backend="aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Compiled, CompiledInPlace])
def test_compiled_models_resume_and_have_plain_names(
    tmp_path: Path, kind: type[TinyTrainer]
) -> None:
    whole, _ = assert_resumes(tmp_path, kind)
    names = whole.state_dict()["models"]["net"]
    assert sorted(names) == ["0.bias", "0.weight", "3.bias", "3.weight"]
    plain = tiny(tmp_path, experiment="plain")
    plain.load_state_dict(whole.state_dict())
    assert plain.global_step == 12


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw foreach": lambda p: torch.optim.AdamW(p, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, fused=True),
    "adam fused amsgrad": lambda p: torch.optim.Adam(p, fused=True, amsgrad=True),
    "adamw capturable off, looped": lambda p: torch.optim.AdamW(p, foreach=False),
    "sgd foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
    "sgd fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, fused=True),
    "adagrad fused": lambda p: torch.optim.Adagrad(p, fused=True),
    "rmsprop foreach": lambda p: torch.optim.RMSprop(p, foreach=True, centered=True),
    "adafactor": lambda p: torch.optim.Adafactor(p),
    "radam": lambda p: torch.optim.RAdam(p, decoupled_weight_decay=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_of_torch_resume_in_every_implementation(tmp_path: Path, name: str) -> None:
    class Own(TinyTrainer):
        def configure_optimizers(self) -> Any:
            return OPTIMIZERS[name](self.net.parameters())

    assert_resumes(tmp_path, Own)


class Numbers(IterableDataset[dict[str, torch.Tensor]]):
    """A stream that shares itself out among workers."""

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        info = torch.utils.data.get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        for index in range(first, 24, step):
            x = torch.full((3,), float(index)) + torch.rand(3)
            yield {"x": x, "y": x.sum().reshape(1).sin(), "index": torch.tensor(index)}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_iterable_data_set_resumes(tmp_path: Path, num_workers: int) -> None:
    class Streaming(TinyTrainer):
        def configure_dataloaders(self) -> Any:
            return DataLoader(Numbers(), batch_size=4, num_workers=num_workers), None

    assert_resumes(tmp_path, Streaming)


# ---------------------------------------------------------------------- loaders


def test_the_stateful_loader_of_torchdata_resumes(tmp_path: Path) -> None:
    stateful = need("torchdata.stateful_dataloader", "torchdata")

    class Stateful(TinyTrainer):
        def configure_dataloaders(self) -> Any:
            train, val = super().configure_dataloaders()
            return stateful.StatefulDataLoader(train.dataset, batch_size=4, shuffle=True), val

    assert_resumes(tmp_path, Stateful)


def test_the_stateful_loader_of_torchdata_resumes_in_a_loop_of_ones_own(tmp_path: Path) -> None:
    stateful = need("torchdata.stateful_dataloader", "torchdata")
    from lightning.fabric import Fabric

    def losses(folder: str, stop_at: int | None) -> list[bytes]:
        fabric = Fabric(accelerator="cpu", devices=1)
        fabric.launch()
        fabric.seed_everything(4, verbose=False)
        net = nn.Linear(3, 1)
        net, sgd = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.1))
        points = tiny(tmp_path).configure_dataloaders()[0].dataset
        loader = stateful.StatefulDataLoader(points, batch_size=4, shuffle=True, num_workers=0)
        found = []
        with ResumableRun(fabric, tmp_path / folder, net=net, sgd=sgd, loader=loader) as run:
            for _ in run.epochs(3):
                for batch in run.batches(loader):
                    sgd.zero_grad()
                    loss = (net(batch["x"]) - batch["y"]).square().mean()
                    fabric.backward(loss)
                    sgd.step()
                    found.append(loss.detach().numpy().tobytes())
                    if run.step + 1 == stop_at:
                        raise_interrupt()
        return found

    whole = losses("whole", None)
    with pytest.raises(Interrupted):
        losses("parts", 8)
    rest = losses("parts", None)
    assert 0 < len(rest) < len(whole) == 18
    assert rest == whole[-len(rest) :]


@pytest.mark.parametrize("is_streamed", [False, True])
def test_data_sets_of_hugging_face_resume(tmp_path: Path, is_streamed: bool) -> None:
    datasets = need("datasets")

    class HuggingFace(TinyTrainer):
        def configure_dataloaders(self) -> Any:
            x = torch.randn(24, 3, generator=torch.Generator().manual_seed(1))
            columns = {"x": x.tolist(), "y": x.sum(1, True).tolist(), "index": list(range(24))}
            data = datasets.Dataset.from_dict(columns).with_format("torch")
            if is_streamed:
                data = data.to_iterable_dataset(num_shards=3)
            return DataLoader(data, batch_size=4, shuffle=not is_streamed), None

    assert_resumes(tmp_path, HuggingFace)


# ---------------------------------------------------------------------- loggers


def test_the_csv_logger_gets_every_row(tmp_path: Path) -> None:
    from lightning.fabric.loggers import CSVLogger

    logger = CSVLogger(tmp_path / "csv", name="run", version="a")
    trainer = tiny(tmp_path, loggers={"csv": logger})
    trainer.fit()
    written = (tmp_path / "csv" / "run" / "a" / "metrics.csv").read_text(encoding="utf-8")
    rows = list(csv.DictReader(written.splitlines()))
    losses = [float(row["train/loss"]) for row in rows if row["train/loss"]]
    log = (trainer.run_directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    exact = [row["train/loss"] for row in map(json.loads, log) if "train/loss" in row]
    assert losses == exact


def test_tensorboard_shows_every_step_once_after_a_restart(tmp_path: Path) -> None:
    need("tensorboard")
    from lightning.fabric.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for callbacks in ({"stop": StopAt(8)}, {}):
        logger = TensorBoardLogger(tmp_path / "tb", name="run", version="a")
        trainer = tiny(tmp_path, loggers={"tb": logger}, callbacks=callbacks)
        if callbacks:
            with pytest.raises(Interrupted):
                trainer.fit()
        else:
            trainer.fit()
    events = EventAccumulator(str(tmp_path / "tb" / "run" / "a"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 13))


def test_weights_and_biases_logs_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = need("wandb")
    from lightning.pytorch.loggers import WandbLogger

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(project="tiny", save_dir=str(tmp_path), offline=True)
    histograms = {"histograms": Histograms(4, parameters=True)}
    trainer = tiny(tmp_path, loggers={"wandb": logger}, callbacks=histograms)
    trainer.fit()
    summary = dict(logger.experiment.summary)
    for kind in ("gradients", "parameters"):
        assert summary[f"{kind}/net.0.weight"]["_type"] == "histogram"
        assert sum(summary[f"{kind}/net.0.weight"]["values"]) == 24
    summary, config = dict(logger.experiment.summary), dict(logger.experiment.config)
    wandb.finish()
    wandb.teardown()
    log = (trainer.run_directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, log) if "train/loss" in row]
    assert summary["train/loss"] == rows[-1]["train/loss"]
    assert summary["final/val/loss"] == trainer.validation_results["val/loss"]
    assert config["training_parameters.n_epochs"] == 2
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


def test_mlflow_logs_into_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = need("mlflow", "mlflow-skinny")
    from lightning.pytorch.loggers import MLFlowLogger

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = f"file:{tmp_path / 'mlruns'}"
    logger = MLFlowLogger(experiment_name="tiny", tracking_uri=uri)
    trainer = tiny(tmp_path, loggers={"mlflow": logger}, project="p" * 251)
    trainer.fit()
    history = mlflow.MlflowClient(uri).get_metric_history(logger.run_id, "train/loss")
    log = (trainer.run_directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    exact = [row["train/loss"] for row in map(json.loads, log) if "train/loss" in row]
    assert [metric.value for metric in sorted(history, key=lambda m: m.step)] == exact
    run = mlflow.MlflowClient(uri).get_run(logger.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["training_parameters.n_epochs"] == "2"
    assert run.data.params["project"] == "p" * 250  # a limit of MLflow's
    # A restart may have another configuration, which MLflow refuses: a run is worth more.
    again = MLFlowLogger(experiment_name="tiny", tracking_uri=uri, run_id=logger.run_id)
    with pytest.warns(RuntimeWarning, match="MLFlowLogger did not take the hyperparameters"):
        tiny(tmp_path, loggers={"mlflow": again}, project="p" * 251, n_epochs=3).fit()


# ---------------------------------------------------------------------- a search


def test_optuna_prunes_trials_that_lag_behind(tmp_path: Path) -> None:
    optuna = need("optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)

    class Pruning(Callback):
        def __init__(self, trial: Any) -> None:
            self.trial = trial

        def post_validation_epoch(self, trainer: Any, results: Any) -> None:
            self.trial.report(results["val/loss"], trainer.current_epoch)
            if self.trial.should_prune():
                raise optuna.TrialPruned

    def objective(trial: Any) -> float:
        lr = trial.suggest_categorical("lr", [0.05, 10.0])
        name = f"lr{lr}"
        callbacks = {"pruning": Pruning(trial)}
        config = tiny_config(tmp_path, experiment=name, lr=lr, n_epochs=4, callbacks=callbacks)
        with TinyTrainer(config) as trainer:
            trainer.fit()
            return trainer.validation_results["val/loss"]

    study = optuna.create_study(
        sampler=optuna.samplers.GridSampler({"lr": [0.05, 10.0]}, seed=1),
        pruner=optuna.pruners.ThresholdPruner(upper=2.0),
    )
    study.optimize(objective, n_trials=2)
    states = {trial.params["lr"]: trial.state.name for trial in study.trials}
    assert states == {0.05: "COMPLETE", 10.0: "PRUNED"}


# ---------------------------------------------------------------------- frozen weights


class LowRank(nn.Module):
    """A frozen layer and a trained correction of rank 1, as in LoRA (Hu et al., 2021)."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, 1, bias=False)
        self.up = nn.Linear(1, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


class Adapted(TinyTrainer):
    base_seed = 11

    def configure_models(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(self.base_seed)  # a pretrained model
            bases = nn.Linear(3, 300), nn.Linear(300, 1)
        self.net = nn.Sequential(LowRank(bases[0]), nn.Tanh(), LowRank(bases[1]))

    def configure_optimizers(self) -> Any:
        trained = [p for p in self.net.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, lr=0.02)


class OtherBase(Adapted):
    base_seed = 12


def test_checkpoints_hold_only_what_trains(tmp_path: Path) -> None:
    whole, rest = assert_resumes(tmp_path, Adapted, save_frozen=False)
    saved = whole.state_dict()["models"]["net"]
    assert sorted(saved) == ["0.down.weight", "0.up.weight", "2.down.weight", "2.up.weight"]
    assert torch.equal(whole.net(torch.ones(2, 3)), rest.net(torch.ones(2, 3)))
    with pytest.raises(StateError, match=r"0\.base\.weight: frozen, and not what it was"):
        tiny(tmp_path, OtherBase, experiment="parts", save_frozen=False).fit()


def test_what_is_unfrozen_is_in_the_checkpoint(tmp_path: Path) -> None:
    class Unfreeze(Callback):
        def pre_train_epoch(self, trainer: Any) -> None:
            if trainer.current_epoch == 1:
                (optimizer,) = trainer.named_optimizers().values()
                base = trainer.components.models["net"][2].base.requires_grad_(True)
                optimizer.add_param_group({"params": list(base.parameters())})

    trainer = tiny(tmp_path, Adapted, save_frozen=False, callbacks={"unfreeze": Unfreeze()})
    trainer.fit()
    names = sorted(trainer.state_dict()["models"]["net"])
    assert "2.base.weight" in names
    assert "0.base.weight" not in names


def adapt(root: Path, devices: dict[str, Any], resume: bool) -> dict[str, bytes]:
    torch.set_default_dtype(torch.float64)
    trainer = tiny(root, Adapted, save_frozen=False, **devices)
    trainer.fit()
    assert trainer.is_resumed == resume
    saved = trainer.state_dict()["models"]["net"]
    assert len(saved) == 4
    return {
        name: (v.full_tensor() if hasattr(v, "full_tensor") else v).numpy().tobytes()
        for name, v in saved.items()
    }


@pytest.mark.distributed
def test_adapters_of_sharded_models_load_on_one_device(tmp_path: Path) -> None:
    both = run_ranks(2, adapt, tmp_path, {"devices": 2, "dp_shard": 2}, False)
    assert both[0] == both[1]
    (one,) = run_ranks(1, adapt, tmp_path, {}, True)
    assert one == both[0]


def test_peft_adapters_resume_without_their_base(tmp_path: Path) -> None:
    peft = need("peft")

    class Lora(TinyTrainer):
        def configure_models(self) -> None:
            with torch.random.fork_rng():
                torch.manual_seed(11)
                base = nn.Sequential(nn.Linear(3, 64), nn.Tanh(), nn.Linear(64, 1))
            config = peft.LoraConfig(r=2, target_modules=["0", "2"], lora_dropout=0.1)
            self.net = peft.get_peft_model(base, config)

        def configure_optimizers(self) -> Any:
            trained = [p for p in self.net.parameters() if p.requires_grad]
            return torch.optim.AdamW(trained, lr=0.02)

    whole, _ = assert_resumes(tmp_path, Lora, save_frozen=False)
    names = whole.state_dict()["models"]["net"]
    assert all("lora_" in name for name in names)
    assert len(names) == 4
    whole.net.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
