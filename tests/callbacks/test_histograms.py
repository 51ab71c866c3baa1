"""Histograms: what loggers get of gradients, weights and batches, on one rank and on several."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import Points, TinyTrainer, differences, exact_state, run_ranks, tiny
from torch import Tensor
from torch.utils.data import DataLoader

from dream_trainer import Callback, Histograms
from dream_trainer.errors import ConfigError
from dream_trainer.world import DreamWorld
from dream_trainer.world.component_state import parameter_names, parameters_of
from dream_trainer.world.value_counts import ValueCounts, count_values
from dream_trainer.world.wrappers import unwrap

WEIGHTS = ("0.weight", "0.bias", "3.weight", "3.bias")


class Experiment:
    """What TensorBoard's logger calls its writer."""

    def __init__(self) -> None:
        self.histograms: dict[tuple[str, int], dict[str, Any]] = {}
        self.pictures: dict[tuple[str, int], Tensor] = {}

    def add_histogram_raw(self, name: str, *, global_step: int, **told: Any) -> None:
        assert len(told["bucket_limits"]) == len(told["bucket_counts"])
        self.histograms[name, global_step] = told

    def add_image(self, name: str, picture: Tensor, *, global_step: int) -> None:
        self.pictures[name, global_step] = picture


class Logger:
    def __init__(self, experiment: Any = None) -> None:
        self.experiment = experiment

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        pass

    def finalize(self, status: str) -> None:
        pass


class Keeping(Callback):
    """Keeps whole gradients, parameters and batches of a step, by name."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.kept: dict[str, Tensor] = {}
        self.batch: Any = None

    def pre_optimizer_step(self, trainer: Any, optimizer: Any) -> None:
        if trainer.global_step + 1 == self.step:
            names = parameter_names(trainer.named_models())
            for one in parameters_of([unwrap(optimizer)]):
                assert one.grad is not None
                for kind, tensor in (("gradients", one.grad), ("parameters", one.detach())):
                    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
                    self.kept[f"{kind}/{names[id(one)]}"] = whole.clone()

    def post_train_step(self, trainer: Any, result: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            self.batch = batch


def test_counts_are_those_of_numpy() -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(3))
    values[:3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    tensors = {
        "normal": values,
        "half": values.bfloat16(),
        "whole": torch.arange(10),
        "equal": torch.full((4,), 2.5),
        "nan": torch.tensor([float("nan")]),
        "empty": torch.zeros(0),
        "absent": None,
    }
    found = count_values(tensors, 16, DreamWorld())
    assert list(found) == ["normal", "half", "whole", "equal"]
    finite = values[3:].double().numpy()
    counts, edges = np.histogram(finite, 16)
    one = found["normal"]
    assert list(one.counts) == counts.tolist()
    assert np.allclose(one.edges, edges)
    assert (one.low, one.high, one.num_nonfinite) == (finite.min(), finite.max(), 3)
    assert np.isclose(one.total, finite.sum())
    assert np.isclose(one.total_squares, np.square(finite).sum())
    assert (found["whole"].num, found["whole"].total) == (10, 45)
    assert (found["equal"].num, found["equal"].edges[0], found["equal"].edges[-1]) == (4, 2, 3)


def test_tensorboard_gets_gradients_parameters_and_the_batch(tmp_path: Path) -> None:
    experiment, keeping = Experiment(), Keeping(5)
    tiny(
        tmp_path,
        callbacks={"histograms": Histograms(5, parameters=True, bins=8), "keeping": keeping},
        loggers={"board": Logger(experiment)},
        gradient_clip_val=1e-3,
    ).fit()  # 12 steps
    names = [f"{kind}/net.{one}" for kind in ("gradients", "parameters") for one in WEIGHTS]
    names += [f"batch/{one}" for one in ("x", "y", "index")]
    expected = {(name, step) for name in names for step in (5, 10)}
    assert set(experiment.histograms) == expected
    told = keeping.kept | {f"batch/{name}": one for name, one in keeping.batch.items()}
    for name, tensor in told.items():  # gradients as they were before clipping
        written = experiment.histograms[name, 5]
        counts, edges = np.histogram(tensor.double().numpy(), 8)
        if tensor.numel() > 1:
            assert written["bucket_counts"] == [0, *counts.tolist()]
            assert np.allclose(written["bucket_limits"], edges)
        assert written["num"] == tensor.numel()
        assert written["min"] == tensor.min().item()
    log = (tmp_path / "default/default/tiny/metrics.jsonl").read_text()
    assert all("/net." not in name for line in log.splitlines() for name in json.loads(line))


def test_the_run_is_the_same_and_a_resumed_one_writes_at_the_same_steps(tmp_path: Path) -> None:
    experiments = [Experiment() for _ in range(3)]

    def trainer(root: str, index: int, **options: Any) -> Any:
        callbacks = {"histograms": Histograms(4, parameters=True)}
        loggers = {"board": Logger(experiments[index])}
        return tiny(tmp_path / root, callbacks=callbacks, loggers=loggers, dropout=0.3, **options)

    plain = tiny(tmp_path / "plain", dropout=0.3)
    straight = trainer("straight", 0)
    plain.fit()
    straight.fit()
    assert differences(exact_state(plain), exact_state(straight)) == []
    trainer("parts", 1, max_steps=6).fit()
    resumed = trainer("parts", 2)
    resumed.fit()
    assert differences(exact_state(straight), exact_state(resumed)) == []
    assert experiments[1].histograms | experiments[2].histograms == experiments[0].histograms
    assert {step for _, step in experiments[2].histograms} == {8, 12}


def test_pictures_of_a_batch_are_a_grid(tmp_path: Path) -> None:
    class Pictures(Points):
        def __getitem__(self, index: int) -> dict[str, Tensor]:
            return {**super().__getitem__(index), "image": torch.full((3, 4, 5), float(index))}

    class Seeing(TinyTrainer):
        def configure_dataloaders(self) -> Any:
            return DataLoader(Pictures(8), batch_size=4), None

    experiment = Experiment()
    tiny(
        tmp_path,
        Seeing,
        callbacks={"histograms": Histograms(1, gradients=False, batch=False, pictures=3)},
        loggers={"board": Logger(experiment)},
        max_steps=1,
    ).fit()
    assert experiment.histograms == {}
    assert list(experiment.pictures) == [("pictures/image", 1)]
    (grid,) = experiment.pictures.values()
    assert grid.dtype is torch.uint8
    assert grid.shape == (3, 9, 11)  # two rows and two columns, with a line between them
    assert [grid[0, 0, 0], grid[0, 0, 6], grid[0, 5, 0]] == [0, 128, 255]


def test_without_a_logger_that_takes_them_one_warning_says_so(tmp_path: Path) -> None:
    callbacks = {"histograms": Histograms(1)}
    trainer = tiny(tmp_path, callbacks=callbacks, loggers={"rows": Logger()})
    with pytest.warns(UserWarning, match="no logger takes histograms") as caught:
        trainer.fit()
    told = [str(one.message) for one in caught if "Histograms" in str(one.message)]
    assert told == [
        "Histograms writes nothing: no logger takes histograms (there is rows (Logger)). "
        "TensorBoardLogger and WandbLogger of lightning.pytorch.loggers do; name one in the "
        "configuration's loggers."
    ]


def test_numbers_that_cannot_work_are_told_together() -> None:
    with pytest.raises(ConfigError, match=r"every_n_steps is 0.*\n.*bins is 1000"):
        Histograms(0, bins=1000)


def test_tensorboards_own_reader_finds_them(tmp_path: Path) -> None:
    loggers = pytest.importorskip("lightning.pytorch.loggers")
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = loggers.TensorBoardLogger(tmp_path / "board", name="", version="")
    callbacks = {"histograms": Histograms(6, batch=False)}
    tiny(tmp_path, callbacks=callbacks, loggers={"board": board}).fit()
    accumulator = reading.EventAccumulator(str(tmp_path / "board"), {"histograms": 0})
    accumulator.Reload()
    assert accumulator.Tags()["histograms"] == [f"gradients/net.{name}" for name in WEIGHTS]
    found = accumulator.Histograms("gradients/net.0.weight")
    assert [(one.step, one.histogram_value.num) for one in found] == [(6, 24), (12, 24)]


def on_ranks(root: Path, options: dict[str, Any]) -> dict[str, Any]:
    experiment, keeping = Experiment(), Keeping(2)
    callbacks = {"histograms": Histograms(2, parameters=True, bins=8), "keeping": keeping}
    loggers = {"board": Logger(experiment)}
    trainer = tiny(root, callbacks=callbacks, loggers=loggers, devices=2, max_steps=2, **options)
    trainer.fit()
    samples = [one["x"] for one in trainer.world.all_gather_object(keeping.batch)]
    return {
        "written": experiment.histograms,
        "whole": {name: one.double().numpy() for name, one in keeping.kept.items()},
        "x": torch.cat(samples).double().numpy(),
    }


@pytest.mark.distributed
@pytest.mark.parametrize("options", [{"dp_replicate": 2}, {"dp_shard": 2}], ids=str)
def test_counts_over_ranks_are_those_of_the_whole_tensors(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    first, second = run_ranks(2, on_ranks, tmp_path, options)
    assert second["written"] == {}
    written = first["written"]
    assert len(written) == 2 * len(WEIGHTS) + 3
    for name, whole in {**first["whole"], "batch/x": first["x"]}.items():
        one = written[name, 2]
        assert one["num"] == whole.size
        assert (one["min"], one["max"]) == (whole.min(), whole.max())
        assert np.isclose(one["sum"], whole.sum())
        if whole.size > 1:
            assert one["bucket_counts"] == [0, *np.histogram(whole, 8)[0].tolist()]


def uneven(world_options: dict[str, Any]) -> ValueCounts:
    from torch.distributed.tensor import Shard, distribute_tensor

    from dream_trainer.configs import DeviceParameters

    world = DreamWorld(DeviceParameters(accelerator="cpu", devices=2, **world_options))
    world.launch()
    assert world.mesh is not None
    sharded = distribute_tensor(torch.arange(7.0).view(7, 1), world.mesh, [Shard(0)])
    return count_values({"a": sharded, "empty": None}, 7, world)["a"]


@pytest.mark.distributed
def test_rows_that_do_not_divide_are_counted_once() -> None:
    for one in run_ranks(2, uneven, {"dp_shard": 2}):
        assert one.counts == (1,) * 7
        assert (one.total, one.total_squares) == (21, 91)
