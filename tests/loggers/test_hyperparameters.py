"""The configuration and the outcome of a run, in the way of each logger."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from support import run_ranks, tiny
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

pytestmark = pytest.mark.may_leave("rng", "thread")


class Recording:
    """A logger with Lightning's ``log_hyperparams``."""

    def __init__(self, refuses: bool = False) -> None:
        self.calls: list[str] = []
        self.parameters: dict[str, Any] = {}
        self.refuses = refuses

    def log_hyperparams(self, params: dict[str, Any]) -> None:
        self.calls.append("log_hyperparams")
        self.parameters = params
        if self.refuses:
            raise RuntimeError("another value is there")

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.calls.append("log_metrics")

    def finalize(self, status: str) -> None:
        self.calls.append("finalize")


class Summarising(Recording):
    """As that of Weights & Biases."""

    def __init__(self) -> None:
        super().__init__()
        self.summary: dict[str, float] = {}

    @property
    def experiment(self) -> Any:
        return self


def test_a_logger_gets_the_configuration_once_before_anything_else(tmp_path: Path) -> None:
    logger = Recording()
    trainer = tiny(tmp_path, loggers={"one": logger}, lr=0.25)
    trainer.fit()
    assert logger.calls[0] == "log_hyperparams"
    assert logger.calls.count("log_hyperparams") == 1
    assert logger.parameters["lr"] == 0.25
    assert logger.parameters["training_parameters.n_epochs"] == 2
    assert logger.parameters["checkpoint_parameters.monitor"] is None
    kept = yaml.safe_load((trainer.run_directory / "config.yaml").read_text(encoding="utf-8"))
    assert kept["lr"] == 0.25


def test_a_logger_that_refuses_them_ends_nothing(tmp_path: Path) -> None:
    logger = Recording(refuses=True)
    with pytest.warns(RuntimeWarning, match="Recording did not take the hyperparameters: Runtime"):
        tiny(tmp_path, loggers={"one": logger}).fit()
    assert logger.calls[-1] == "finalize"


def test_a_summary_gets_the_final_and_the_best_value(tmp_path: Path) -> None:
    logger = Summarising()
    options: dict[str, Any] = {"monitor": "val/loss", "lr": 0.5}
    trainer = tiny(tmp_path, loggers={"one": logger}, n_epochs=3, **options)
    trainer.fit()
    best = trainer.checkpointer.store.best("min", "val/loss")
    assert logger.summary == {
        "final/val/loss": trainer.validation_results["val/loss"],
        "best/val/loss": best.manifest.monitored_value,
    }
    again = Summarising()
    tiny(tmp_path, loggers={"one": again}, n_epochs=3, **options).fit()  # it is done already
    assert again.summary == {}


def test_only_rank_0_tells_its_loggers(tmp_path: Path) -> None:
    def rank() -> list[str]:
        logger = Summarising()
        tiny(tmp_path, loggers={"one": logger}).fit()
        return [*logger.calls[:1], *logger.summary]

    assert run_ranks(2, rank) == [["log_hyperparams", "final/val/loss"], []]


def test_the_csv_logger_keeps_a_file_of_them(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="csv", version="one")
    tiny(tmp_path, loggers={"csv": logger}).fit()
    kept = yaml.safe_load((tmp_path / "csv" / "one" / "hparams.yaml").read_text(encoding="utf-8"))
    assert (kept["lr"], kept["training_parameters.n_epochs"]) == (0.05, 2)


def hparams_of(folder: Path) -> tuple[dict[str, Any], set[str], dict[str, list[tuple[int, float]]]]:
    """What TensorBoard's page shows of a run: parameters, names of metrics; and all curves."""
    events = EventAccumulator(str(folder))
    events.Reload()
    plugin = events.PluginTagToContent(metadata.PLUGIN_NAME)
    start = metadata.parse_session_start_info_plugin_data(plugin[metadata.SESSION_START_INFO_TAG])
    experiment = metadata.parse_experiment_plugin_data(plugin[metadata.EXPERIMENT_TAG])
    parameters = {
        name: getattr(value, value.WhichOneof("kind")) for name, value in start.hparams.items()
    }
    curves = {
        tag: [(one.step, one.value) for one in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }
    return parameters, {info.name.tag for info in experiment.metric_infos}, curves


def test_tensorboards_page_has_parameters_and_metrics_also_after_a_restart(tmp_path: Path) -> None:
    for steps in (8, None):  # the second goes on where the first was stopped
        logger = TensorBoardLogger(tmp_path, name="tb", version="one")
        trainer = tiny(
            tmp_path, loggers={"tb": logger}, monitor="val/loss", n_epochs=2, max_steps=steps
        )
        trainer.fit()
    parameters, metrics, curves = hparams_of(tmp_path / "tb" / "one")
    assert parameters["lr"] == 0.05
    assert parameters["training_parameters.n_epochs"] == 2
    assert metrics == {"final/val/loss", "best/val/loss"}
    final = trainer.validation_results["val/loss"]
    assert curves["final/val/loss"][-1] == (12, pytest.approx(final))
    assert [step for step, _ in curves["val/loss"]] == [6, 12]
    assert "hp_metric" not in curves
