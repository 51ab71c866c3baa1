"""Presets make one configuration of another; overfit_batches repeats the same few batches."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import (
    Points,
    RecordingCallback,
    TinyConfig,
    TinyTrainer,
    differences,
    exact_state,
    run_ranks,
    tiny,
    tiny_config,
)
from torch.utils.data import DataLoader, IterableDataset

from dream_trainer import BaseTrainer, ResumableLoader, plan_run
from dream_trainer.configs.yaml_text import load_yaml
from dream_trainer.trainer.presets import debug, overfit, presets_of
from dream_trainer.trainer.run_directory import config_yaml

# A run seeds the global streams.
pytestmark = pytest.mark.may_leave("rng")


class Noise(IterableDataset[Any]):
    """Sample numbers with draws: other ones in each epoch, if the stream is another one."""

    def __iter__(self) -> Iterator[tuple[int, float, float]]:
        for index in range(20):
            yield index, random.random(), float(torch.rand(()))


class NoisyPoints(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(Points(24, augment=True))


class WithState:
    """Keeps its own position, across epochs, and draws while it is read."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Iterator[tuple[int, float]]:
        while self.at < 12:
            self.at += 1
            yield self.at - 1, random.random()
        self.at = 0

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


def shuffled(num_workers: int = 0) -> Any:
    return DataLoader(
        Points(22, augment=True), 4, shuffle=True, num_workers=num_workers,
        persistent_workers=num_workers > 0,
    )  # fmt: skip


LOADERS: dict[str, Callable[[], Any]] = {
    "shuffled": shuffled,
    "workers": lambda: shuffled(2),
    "dropping": lambda: DataLoader(Points(22, augment=True), 4, shuffle=True, drop_last=True),
    "batch_sampler": lambda: DataLoader(Points(22), batch_sampler=[[3, 1], [2], [5, 0, 4], [6]]),
    "iterable": lambda: DataLoader(Noise(), 4),
    "sequence": lambda: [[0.5, 1.0], [2.0], [3.0], [4.0]],
    "with_state": WithState,
}


def repeating(name: str, num_batches: int = 3, **place: int) -> ResumableLoader:
    loader = ResumableLoader(LOADERS[name](), seed=3).attach(looks_ahead=True, **place)
    loader.repeat_first(num_batches)
    return loader


def epoch(loader: ResumableLoader) -> list[tuple[str, bool | None, Any]]:
    """Batches with what the loader says of each."""
    return [(repr(batch), loader.is_last, loader.num_samples_all_ranks) for batch in loader]


# ---------------------------------------------------------------------- the loader


@pytest.mark.parametrize("name", LOADERS)
def test_every_epoch_is_the_beginning_of_the_first(name: str) -> None:
    whole = ResumableLoader(LOADERS[name](), seed=3).attach(looks_ahead=True)
    first = [batch for batch, _, _ in epoch(whole)][:3]
    loader = repeating(name)
    for number in range(3):
        loader.set_epoch(number)
        read = epoch(loader)
        assert [batch for batch, _, _ in read] == first
        assert [is_last for _, is_last, _ in read] == [False, False, True]
    assert loader.epoch == 3
    loader.close()
    whole.close()


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("position", range(4))
def test_a_position_in_a_repeated_epoch_is_continued(name: str, position: int) -> None:
    straight = repeating(name)
    epoch(straight)
    batches = iter(straight)
    for _ in range(position):
        next(batches)
    state = copy.deepcopy(straight.state_dict())
    rest = [repr(batch) for batch in batches]
    assert len(rest) == 3 - position
    continued = repeating(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *_, **__: None)  # of batches read and dropped
        continued.load_state_dict(state)
        assert [repr(batch) for batch in continued] == rest
        again, other = epoch(straight), epoch(continued)
    assert again == other
    straight.close()
    continued.close()


def test_the_loader_tells_the_length_of_what_it_repeats() -> None:
    loader = repeating("shuffled")
    assert (loader.num_batches, loader.num_samples_ahead(9)) == (3, [4, 4, 4])
    assert repeating("sequence").num_batches == 3
    assert repeating("shuffled", 9).num_batches == 6  # as many as there are
    assert len(epoch(repeating("iterable", 9))) == 5
    loader.repeat_first(None)
    assert loader.num_batches == 6
    orders = [[batch["index"].tolist() for batch in loader] for _ in range(2)]
    assert orders[0] != orders[1]


def test_ranks_repeat_the_first_batches_of_all_of_them() -> None:
    whole = [[b["index"].tolist() for b in ResumableLoader(shuffled(), seed=3)]]
    order = [index for batch in whole[0] for index in batch]
    for _ in range(2):
        per_rank = [repeating("shuffled", 2, rank=rank, size=2) for rank in range(2)]
        seen = [[b["index"].tolist() for b in loader] for loader in per_rank]
        assert [a + b for a, b in zip(*seen, strict=True)] == [order[:8], order[8:16]]


# ---------------------------------------------------------------------- overfit_batches


class Streaming(TinyTrainer):
    def configure_dataloaders(self) -> Any:
        return DataLoader(NoisyPoints(), 4), None


@pytest.mark.parametrize(
    ("kind", "given", "batches"),
    [
        (TinyTrainer, {"overfit_batches": 2}, 2),
        (TinyTrainer, {"overfit_batches": 0.25}, 2),
        (TinyTrainer, {"overfit_batches": 1.0, "num_samples": 12}, 3),
        (TinyTrainer, {"overfit_batches": 3, "gradient_accumulation_steps": 2}, 3),
        (TinyTrainer, {"overfit_batches": 4, "train_steps_per_epoch": 0.5}, 2),
        (Streaming, {"overfit_batches": 2, "gradient_accumulation_steps": 2}, 2),
    ],
)
def test_a_run_repeats_its_first_batches_and_continues_exactly(
    tmp_path: Path, kind: type[TinyTrainer], given: dict[str, Any], batches: int
) -> None:
    given = given | {"n_epochs": 3, "dropout": 0.3, "augment": True, "num_workers": 0}
    straight = tiny(tmp_path, kind, experiment="straight", **given)
    straight.fit()
    one = straight.seen[:batches]
    assert straight.seen == one * 3
    assert straight.current_epoch == 3
    for step in [*range(1, straight.global_step), None]:
        cut = tiny(tmp_path, kind, experiment="cut", max_steps=step, **given)
        cut.fit()
    assert differences(exact_state(straight), exact_state(cut)) == []
    logs = [(t.run_directory / "metrics.jsonl").read_bytes() for t in (straight, cut)]
    assert logs[0] == logs[1]


def test_a_plan_counts_what_is_repeated(tmp_path: Path) -> None:
    given = {"overfit_batches": 0.5, "n_epochs": 2, "num_samples": 32}
    for ranks, batches in ((1, 4), (2, 2), (4, 1)):
        plan = plan_run(TinyTrainer, tiny_config(tmp_path, **given), ranks)
        assert plan.train is not None
        assert (plan.train.batches, plan.train.samples_used) == (batches, 16)
        assert (plan.steps.per_epoch, plan.steps.total) == (batches, 2 * batches)


def test_what_fills_no_step_is_repeated_all_the_same(tmp_path: Path) -> None:
    class Dropping(TinyTrainer):
        def configure_dataloaders(self) -> Any:
            return DataLoader(Points(24), 4, drop_last=True), None

    trainer = tiny(tmp_path, Dropping, overfit_batches=1, global_batch_size=8, enable=False)
    trainer.fit()
    assert (trainer.global_step, trainer.seen) == (2, [[0, 1, 2, 3]] * 2)


def _on_a_rank(root: str) -> list[list[int]]:
    trainer = tiny(root, experiment="ranks", n_epochs=2, overfit_batches=2, enable=False)
    trainer.fit()
    seen: list[list[int]] = trainer.seen
    return seen


@pytest.mark.distributed
def test_every_rank_repeats_its_own(tmp_path: Path) -> None:
    first, second = run_ranks(2, _on_a_rank, str(tmp_path))
    assert first == first[:2] * 2
    assert second == second[:2] * 2
    samples = [index for batch in first[:2] + second[:2] for index in batch]
    assert len(set(samples)) == len(samples) == 16


# ---------------------------------------------------------------------- presets


def config(root: Path, **options: Any) -> TinyConfig:
    given: dict[str, Any] = {
        "n_epochs": 50,
        "max_time": "2h",
        "global_batch_size": 8,
        "val_every_n_steps": 3,
        "num_sanity_val_steps": 2,
        "train_steps_per_epoch": 0.5,
        "every_n_steps": 1,
        "resume": "must",
    }
    return tiny_config(root, **given | options)


def test_debug_runs_one_batch_of_everything_and_leaves_nothing(tmp_path: Path) -> None:
    recording = RecordingCallback()
    trainer = TinyTrainer(debug(config(tmp_path, callbacks={"recording": recording})))
    trainer.fit()
    assert recording.calls.count("pre_train_step") == trainer.global_step == 1
    assert recording.calls.count("pre_validation_step") == 1
    assert recording.calls.count("post_epoch") == 1
    assert list(tmp_path.iterdir()) == []


def test_overfit_learns_a_few_batches_by_heart_and_leaves_nothing(tmp_path: Path) -> None:
    recording = RecordingCallback()
    given = config(tmp_path, callbacks={"recording": recording}, overfit_batches=2, max_steps=60)
    given.lr = 0.1
    trainer = TinyTrainer(overfit(given))
    trainer.fit()
    assert trainer.global_step == 60
    assert trainer.seen == trainer.seen[:2] * 60  # two batches of 4 fill a step of 8
    assert "pre_validation_step" not in recording.calls
    assert list(tmp_path.iterdir()) == []
    samples = [Points(24)[index] for batch in trainer.seen[:2] for index in batch]
    x, y = (torch.stack([sample[name] for sample in samples]) for name in ("x", "y"))
    with torch.no_grad():
        assert (trainer.net(x) - y).square().mean() < 0.1 * y.var()


def test_overfit_has_an_end_and_a_number_of_batches_of_its_own(tmp_path: Path) -> None:
    made = overfit(config(tmp_path)).training_parameters
    assert (made.max_steps, made.overfit_batches, made.n_epochs) == (500, 4, None)
    assert str(made.max_time) == "2h"


@pytest.mark.parametrize("preset", [debug, overfit])
def test_a_preset_makes_another_configuration(tmp_path: Path, preset: Any) -> None:
    given = config(tmp_path)
    given.loggers = {"mine": None}
    before = config_yaml(given)
    made = preset(given)
    assert config_yaml(given) == before
    assert type(made) is TinyConfig
    assert made.training_parameters is not given.training_parameters
    assert config_yaml(preset(made)) == config_yaml(made)
    assert (made.batch_size, made.experiment) == (given.batch_size, given.experiment)
    assert load_yaml(config_yaml(made))["checkpoint_parameters"]["enable"] is False


def test_presets_are_inherited_by_name() -> None:
    def small(config: Any) -> Any:
        return config

    def smaller(config: Any) -> Any:
        return config

    class Mine(TinyTrainer):
        presets = {"tiny": small}  # noqa: RUF012 - as users write it

    class Yours(Mine):
        presets = {"tiny": smaller, "overfit": None}  # noqa: RUF012

    class Plain(Yours):
        pass

    assert presets_of(BaseTrainer) == {"debug": debug, "overfit": overfit}
    assert presets_of(Mine) == {"debug": debug, "overfit": overfit, "tiny": small}
    assert presets_of(Yours) == presets_of(Plain) == {"debug": debug, "tiny": smaller}
    assert presets_of(object) == {}
