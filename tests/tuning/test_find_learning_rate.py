"""A range test tells a rate, the same on every rank, and leaves no trace in a run."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import (
    Points,
    RecordingCallback,
    TinyConfig,
    TinyTrainer,
    exact_state,
    flat,
    run_ranks,
    tiny_config,
)
from torch import nn
from torch.utils.data import DataLoader

from dream_trainer import (
    LightningModuleTrainer,
    LightningModuleTrainerConfig,
    find_learning_rate,
)
from dream_trainer.configs import DeviceParameters, TrainingParameters
from dream_trainer.errors import ConfigError
from dream_trainer.randomness import preserved, rng_state
from dream_trainer.tuning import LearningRateResult
from dream_trainer.tuning.smoothing import smoothed


class Normed(TinyTrainer):
    """With running statistics, a cycle of rates and momentum, and losses written down."""

    def configure_models(self) -> None:
        width = 8
        self.net = nn.Sequential(
            nn.Linear(3, width), nn.BatchNorm1d(width), nn.Dropout(0.2), nn.Linear(width, 1)
        )

    def configure_schedulers(self) -> Any:
        (optimizer,) = self.named_optimizers().values()
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, self.config.lr, total_steps=14)


OPTIONS: dict[str, Any] = {"augment": True, "num_samples": 24, "lr": 0.03, "n_epochs": 2}


def fitted(config: TinyConfig, kind: type[TinyTrainer] = Normed) -> dict[str, Any]:
    with kind(config) as trainer:
        trainer.fit()
        return exact_state(trainer)


def a_test(config: TinyConfig, kind: type[TinyTrainer] = Normed, **options: Any) -> Any:
    return find_learning_rate(kind, config, **{"steps": 20, "min_lr": 1e-5} | options)


def logs_of(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("metrics.jsonl")}


# ---------------------------------------------------------------------- without a trace


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_fit_after_the_test_is_a_fit_without_it(tmp_path: Path, num_workers: int) -> None:
    options = OPTIONS | {"num_workers": num_workers, "gradient_accumulation_steps": 2}
    alone = fitted(tiny_config(tmp_path / "alone", **options))
    config = tiny_config(tmp_path / "after", **options)
    result = a_test(config)
    assert len(result.lrs) == 20  # more than the two epochs of the run
    assert not (tmp_path / "after").exists()
    assert fitted(config) == alone
    assert logs_of(tmp_path / "after") == logs_of(tmp_path / "alone")


def test_a_run_that_is_there_is_neither_read_nor_changed(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, **OPTIONS | {"max_steps": 5, "every_n_steps": 1})
    fitted(config)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    fresh = a_test(tiny_config(tmp_path / "elsewhere", **OPTIONS))
    assert a_test(config).losses == fresh.losses
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_a_trainer_beside_it_does_not_notice(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "a", **OPTIONS | {"max_steps": 4})
    trainer = Normed(config)
    trainer.fit()
    before = exact_state(trainer)
    a_test(config)
    assert exact_state(trainer) == before
    trainer.config.training_parameters.max_steps = 9
    trainer.fit()
    assert exact_state(trainer) == fitted(tiny_config(tmp_path / "b", **OPTIONS | {"max_steps": 9}))


def test_streams_of_the_program_callbacks_and_configuration_stay_as_they_were(
    tmp_path: Path,
) -> None:
    class Drawing(Normed):
        def __init__(self, config: TinyConfig, **kwargs: Any) -> None:
            super().__init__(config, **kwargs)
            random.random(), np.random.rand(), torch.rand(1)
            config.callbacks["added"] = RecordingCallback()

    recording = RecordingCallback()
    config = tiny_config(tmp_path, callbacks={"recording": recording}, seed=None, **OPTIONS)
    before, streams = dataclasses.replace(config), flat(rng_state())
    a_test(config, Drawing)
    assert flat(rng_state()) == streams
    assert recording.calls == []
    assert config == before
    assert list(config.callbacks) == ["summary", "progress", "recording"]


@dataclasses.dataclass(kw_only=True)
class HoldingConfig(TinyConfig):
    model: Any = None


class Holding(TinyTrainer):
    """Trains a model that the configuration holds, as the command line makes it."""

    config: HoldingConfig

    def configure_models(self) -> None:
        self.net = self.config.model


def test_a_model_in_the_configuration_is_not_trained(tmp_path: Path) -> None:
    parts = vars(tiny_config(tmp_path, **OPTIONS))
    with preserved():
        config = HoldingConfig(**parts, model=nn.Linear(3, 1))
    before = flat(config.model.state_dict())
    result = a_test(config, Holding)
    assert result.losses[0] != result.losses[-1]
    assert flat(config.model.state_dict()) == before


def test_what_cannot_be_copied_is_refused_by_name(tmp_path: Path) -> None:
    config = HoldingConfig(**vars(tiny_config(tmp_path)), model=(n for n in range(3)))
    with pytest.raises(ConfigError, match="model cannot be copied"):
        a_test(config, Holding)


class Failing(Normed):
    def compute_loss(self, batch: Any, batch_idx: int) -> Any:
        if self.global_step == 7:
            raise KeyboardInterrupt
        return super().compute_loss(batch, batch_idx)


def test_an_interrupted_test_leaves_no_trace_either(tmp_path: Path) -> None:
    config, streams = tiny_config(tmp_path / "after", **OPTIONS), flat(rng_state())
    with pytest.raises(KeyboardInterrupt):
        a_test(config, Failing)
    assert flat(rng_state()) == streams
    assert fitted(config) == fitted(tiny_config(tmp_path / "alone", **OPTIONS))


# ---------------------------------------------------------------------- on ranks

LAYOUTS = {
    "ddp": DeviceParameters.DDP(accelerator="cpu"),
    "sharded": DeviceParameters.FSDP(dp_shard=2, accelerator="cpu"),
}


def _tested_and_fitted(root: Path, layout: str, is_tested: bool) -> tuple[Any, ...]:
    kind = Normed if layout == "ddp" else TinyTrainer
    devices = LAYOUTS[layout]
    config = tiny_config(root, device_parameters=devices, num_workers=1, **OPTIONS)
    result = a_test(config, kind, early_stop_threshold=1.5) if is_tested else None
    return result, fitted(config, kind)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_agree_and_go_on_as_without_it(layout: str, tmp_path: Path) -> None:
    found = run_ranks(2, _tested_and_fitted, tmp_path / "after", layout, True)
    alone = run_ranks(2, _tested_and_fitted, tmp_path / "alone", layout, False)
    (first, _), (second, _) = found
    assert first == second
    assert [state for _, state in found] == [state for _, state in alone]


class Uneven(TinyTrainer):
    """Each rank has a loss of its own, and one of them diverges by itself."""

    def compute_loss(self, batch: Any, batch_idx: int) -> Any:
        loss = super().compute_loss(batch, batch_idx)
        return loss * 0 + self.world.rank + (100.0 * self.world.rank if self.global_step > 9 else 0)


def _on_uneven_ranks(root: Path) -> LearningRateResult:
    found: LearningRateResult = a_test(tiny_config(root, **OPTIONS), Uneven)
    return found


def test_the_loss_is_a_mean_over_ranks_and_one_that_diverges_ends_it_for_all(
    tmp_path: Path,
) -> None:
    first, second = run_ranks(2, _on_uneven_ranks, tmp_path)
    assert first == second
    assert first.is_diverged
    assert first.losses == (*[0.5] * 10, 50.5)


# ---------------------------------------------------------------------- what is tried


class Grouped(TinyTrainer):
    """Two groups of parameters and a warm-up, which has lowered the rates already."""

    def configure_optimizers(self) -> Any:
        first, last = self.net[0].parameters(), self.net[3].parameters()
        groups = [{"params": first, "lr": 0.02}, {"params": last, "lr": torch.tensor(0.1)}]
        self.used: list[tuple[float, ...]] = []
        return torch.optim.SGD(groups)

    def configure_schedulers(self) -> Any:
        (optimizer,) = self.named_optimizers().values()
        return torch.optim.lr_scheduler.LinearLR(optimizer, 0.01)

    def step(self, *arguments: Any) -> Any:
        (optimizer,) = self.named_optimizers().values()
        norm = super().step(*arguments)
        self.used.append(tuple(float(group["lr"]) for group in optimizer.param_groups))
        return norm


def test_rates_grow_and_groups_keep_their_ratio(tmp_path: Path) -> None:
    made: list[Grouped] = []

    def make(config: TinyConfig) -> Grouped:
        made.append(Grouped(config))
        return made[-1]

    result = find_learning_rate(make, tiny_config(tmp_path), min_lr=1e-5, max_lr=1e-2, steps=10)
    assert result.configured == pytest.approx(0.02)
    assert result.lrs[0] == 1e-5
    assert result.lrs[-1] == pytest.approx(1e-2)
    ratios = {round(after / before, 6) for before, after in itertools.pairwise(result.lrs)}
    assert ratios == {round(1000 ** (1 / 9), 6)}
    expected = [(lr, 5 * lr) for lr in result.lrs]
    assert np.allclose(made[0].used, expected, rtol=1e-6)


def test_linear_rates_add_the_same_number(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    result = a_test(config, TinyTrainer, mode="linear", min_lr=0.1, max_lr=1.0, steps=10)
    assert np.allclose(result.lrs, np.linspace(0.1, 1.0, 10))


class Two(TinyTrainer):
    def configure_models(self) -> None:
        super().configure_models()
        self.other = nn.Linear(3, 1)

    def configure_optimizers(self) -> Any:
        make = torch.optim.SGD
        return {"a": make(self.net.parameters(), 0.1), "b": make(self.other.parameters(), 0.3)}

    def configure_schedulers(self) -> None:
        return None

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = (self.net(batch["x"]) + self.other(batch["x"]) - batch["y"]).square().mean()
        self.backward(loss)
        self.step("a")
        self.step("b")
        rates = {name: one.param_groups[0]["lr"] for name, one in self.named_optimizers().items()}
        return {"loss": loss, "rate_a": rates["a"], "rate_b": rates["b"]}


def test_one_optimizer_or_all(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    wide = {"early_stop_threshold": None, "max_lr": 0.1}
    both = a_test(config, Two, loss="rate_b", **wide)
    assert np.allclose(both.losses, 3 * np.array(both.lrs))
    alone = a_test(config, Two, optimizer="b", loss="rate_a", **wide)
    assert set(alone.losses) == {0.1}
    assert alone.configured == 0.3
    with pytest.raises(ConfigError, match="no optimizer 'c'"):
        a_test(config, Two, optimizer="c")
    with pytest.raises(ConfigError, match="there is: loss, rate_a, rate_b"):
        a_test(config, Two, loss="cross_entropy")


def test_a_loss_that_is_not_finite_ends_it(tmp_path: Path) -> None:
    class Broken(TinyTrainer):
        def compute_loss(self, batch: Any, batch_idx: int) -> Any:
            loss = super().compute_loss(batch, batch_idx)
            return loss * math.nan if self.global_step == 12 else loss

    config = tiny_config(tmp_path, on_nonfinite="skip")
    result = a_test(config, Broken, early_stop_threshold=None)
    assert result.is_diverged
    assert len(result.losses) == 13
    assert len(result.smoothed) == 12


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        find_learning_rate(
            TinyTrainer,
            tiny_config(tmp_path),
            min_lr=1.0,
            max_lr=0.1,
            steps=3,
            mode="cubic",  # type: ignore[arg-type]
            early_stop_threshold=0.5,
            smoothing=1.0,
        )
    assert len(caught.value.problems) == 5


# ---------------------------------------------------------------------- what is suggested


def result_of(losses: list[float], smoothing: float = 0.8) -> LearningRateResult:
    lrs = tuple(10 ** (-5 + 5 * i / (len(losses) - 1)) for i in range(len(losses)))
    return LearningRateResult(lrs, tuple(losses), 1e-3, False, "exponential", smoothing)


def test_the_suggestion_is_where_a_noisy_loss_falls_fastest() -> None:
    noise = np.random.default_rng(0).normal(0, 0.05, 100)
    # Falls around the point 60, and blows up behind the point 85.
    curve = [2.5 - 2 / (1 + math.exp((60 - i) / 4)) + max(0, i - 85) ** 2 for i in range(100)]
    result = result_of([float(c + n) for c, n in zip(curve, noise, strict=True)])
    assert result.suggestion is not None
    assert result.factor is not None
    assert abs(result.lrs.index(result.suggestion) - 60) <= 4
    assert result.factor == result.suggestion / 1e-3
    assert f"suggestion {result.suggestion:.2g}" in str(result)


def test_smoothing_does_not_lag() -> None:
    step = [1.0] * 50 + [0.0] * 50
    steepest = int(np.gradient(smoothed(step, 0.8)).argmin())
    assert abs(steepest - 49.5) <= 1


@pytest.mark.parametrize("losses", [[1.0] * 50, [1.0 + i for i in range(50)], [1.0, math.nan]])
def test_without_a_fall_there_is_no_suggestion(losses: list[float]) -> None:
    result = result_of(losses)
    assert result.suggestion is None
    assert result.factor is None
    assert "no suggestion" in str(result)


def test_a_picture(tmp_path: Path) -> None:
    result = a_test(tiny_config(tmp_path))
    axes = result.plot()
    assert axes.get_xscale() == "log"
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert tuple(lines["loss"].get_ydata()) == result.losses
    result.save(tmp_path / "rates.png")
    assert (tmp_path / "rates.png").read_bytes().startswith(b"\x89PNG")


# ---------------------------------------------------------------------- other ways to train


def test_ranks_that_are_forked_for_a_notebook_send_their_result_home(tmp_path: Path) -> None:
    forked = DeviceParameters(accelerator="cpu", devices=2, strategy="ddp_fork")
    with preserved():
        result = a_test(tiny_config(tmp_path, device_parameters=forked), TinyTrainer)
    assert len(result.losses) == len(result.lrs) >= 10
    assert result.configured == 0.05


def test_a_lightning_module_with_a_schedule_of_its_own(tmp_path: Path) -> None:
    pytorch = pytest.importorskip("lightning.pytorch")

    class Lit(pytorch.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(3, 1)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return (self.net(batch["x"]) - batch["y"]).square().mean()

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=5)
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

        def train_dataloader(self) -> Any:
            return DataLoader(Points(24), 4, shuffle=True)

    config = LightningModuleTrainerConfig(
        root_dir=str(tmp_path),
        device_parameters=DeviceParameters(accelerator="cpu"),
        training_parameters=TrainingParameters(n_epochs=1),
    )
    with preserved():
        torch.manual_seed(1)  # from some weights the loss explodes before the last step
        result = find_learning_rate(
            lambda given: LightningModuleTrainer(given, Lit()), config, min_lr=1e-4, steps=12
        )
    assert len(result.losses) == 12
    assert result.configured == 0.1
