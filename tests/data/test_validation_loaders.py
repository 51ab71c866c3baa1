"""Each validation of a run reads the same, from the beginning, interrupted or not."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import Points, TinyTrainer, tiny
from torch.utils.data import DataLoader, IterableDataset, RandomSampler

from dream_trainer.data import ResumableLoader
from dream_trainer.errors import ConfigError

# A run seeds the global streams.
pytestmark = pytest.mark.may_leave("rng")

NUM_BATCHES = 4


def batch_of(index: int, noise: float = 0.0) -> dict[str, torch.Tensor]:
    x = torch.full((2, 3), float(index)) + noise
    return {"x": x, "y": x[:, :1].sin(), "index": torch.full((2,), index)}


class Stream:
    """Draws, also from a generator of its own."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng()

    def __iter__(self) -> Iterator[Any]:
        for index in range(NUM_BATCHES):
            yield batch_of(index, random.random() + float(self.rng.random()))


class Stateful:
    """Keeps its position, and goes on there; its epochs are ordered by a count of its own."""

    def __init__(self) -> None:
        self.at = self.num_epochs = 0

    def __iter__(self) -> Iterator[Any]:
        while self.at < NUM_BATCHES:
            self.at += 1
            yield batch_of((self.at + self.num_epochs) % NUM_BATCHES, random.random())
        self.at = 0
        self.num_epochs += 1

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at, "num_epochs": self.num_epochs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at, self.num_epochs = state["at"], state["num_epochs"]


class Shards(IterableDataset[dict[str, torch.Tensor]]):
    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for index in range(2 * NUM_BATCHES):
            yield {name: value[0] for name, value in batch_of(index, random.random()).items()}


def map_style(**options: Any) -> DataLoader[Any]:
    data = Points(2 * NUM_BATCHES, augment=True)
    return DataLoader(data, 2, sampler=RandomSampler(data), **options)


LOADERS: dict[str, Callable[[], Any]] = {
    "map-style": map_style,
    "map-style, workers that persist": lambda: map_style(num_workers=1, persistent_workers=True),
    "iterable": Stream,
    "own state": Stateful,
    "iterable data set": lambda: DataLoader(Shards(), 2),
    "iterable data set, worker": lambda: DataLoader(Shards(), 2, num_workers=1),
    "list": lambda: [batch_of(index) for index in range(NUM_BATCHES)],
}


class Validates(TinyTrainer):
    """Remembers what each validation reads."""

    def __init__(self, config: Any, make: Callable[[], Any]) -> None:
        super().__init__(config)
        self.make = make
        self.validations: list[list[Any]] = []

    def configure_dataloaders(self) -> Any:
        return super().configure_dataloaders()[0], self.make()

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 0:
            self.validations.append([])
        self.validations[-1].append({name: value.tolist() for name, value in batch.items()})
        return super().validation_step(batch, batch_idx)


def rows(trainer: Any) -> list[dict[str, float]]:
    lines = (trainer.run_directory / "metrics.jsonl").read_text().splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if "second" not in key}
        for line in lines
    ]


@pytest.mark.parametrize("limit", [None, 1, 3])
@pytest.mark.parametrize("name", LOADERS)
def test_each_validation_reads_the_same_interrupted_or_not(
    tmp_path: Path, name: str, limit: int | None
) -> None:
    def trainer(experiment: str, **options: Any) -> Any:
        rhythm = {"n_epochs": 2, "val_every_n_steps": 2, "num_samples": 12, "dropout": 0.3}
        config = tiny(
            tmp_path,
            experiment=experiment,
            val_steps_per_epoch=limit,
            num_sanity_val_steps=2,
            **rhythm | options,
        ).config
        return Validates(config, LOADERS[name])

    def fit(trainer: Any) -> Any:
        trainer.fit()
        trainer.loop.val_loader.close()
        return trainer

    straight = fit(trainer("straight"))
    sanity, first, *others = straight.validations
    assert sanity == first[:2] + sanity[len(first[:2]) :]
    assert len(first) == (limit or NUM_BATCHES)
    assert len(others) == 3
    assert all(other == first for other in others)

    stopped = fit(trainer("cut", max_steps=3))
    resumed = fit(trainer("cut"))
    assert resumed.validations[1:] == [first] * (4 - len(stopped.validations[1:]))
    assert rows(resumed) == rows(straight)


def test_a_stateful_loader_is_read_from_its_first_state_whoever_rewinds_it() -> None:
    one = ResumableLoader(Stateful(), seed=3)

    def epoch(count: int) -> list[Any]:
        one.rewind()
        return [batch["x"].tolist() for batch, _ in zip(one, range(count), strict=False)]

    whole = epoch(100)
    assert len(whole) == NUM_BATCHES
    assert epoch(2) == whole[:2]
    assert epoch(100) == whole
    assert one.state_dict()["position"] == 0


@pytest.mark.parametrize("make", [Stateful, map_style, Stream])
def test_one_loader_for_training_and_validation_is_refused(
    tmp_path: Path, make: Callable[[], Any]
) -> None:
    class Same(TinyTrainer):
        def configure_dataloaders(self) -> Any:
            loader = ResumableLoader(make())
            return loader, loader

    with pytest.raises(ConfigError, match="val_dataloader: it is the same object as train_data"):
        tiny(tmp_path, Same, enable=False).fit()


def test_one_loader_with_a_state_for_both_is_refused_also_unwrapped(tmp_path: Path) -> None:
    class Same(TinyTrainer):
        def configure_dataloaders(self) -> Any:
            loader = Stateful()
            return loader, loader

    with pytest.raises(ConfigError, match="val_dataloader: it is the same object as train_data"):
        tiny(tmp_path, Same, enable=False, max_steps=1).fit()


def test_testing_on_the_loader_that_training_goes_on_from_is_refused(tmp_path: Path) -> None:
    trainer = tiny(tmp_path, enable=False)
    trainer.prepare()
    with pytest.raises(ConfigError, match="test: it is the same object as train_dataloader"):
        trainer.test(trainer.loop.train_loader)


def test_one_plain_loader_for_both_reads_like_two(tmp_path: Path) -> None:
    """Without a state of its own, a DataLoader has no position that they could share."""

    class Same(TinyTrainer):
        def configure_dataloaders(self) -> Any:
            train, _ = super().configure_dataloaders()
            other = train if self.config.has_validation else super().configure_dataloaders()[0]
            return train, other

    seen = []
    for same in (True, False):
        name = f"same-{same}"
        trainer = tiny(
            tmp_path, Same, has_validation=same, experiment=name, val_every_n_steps=1, enable=False
        )
        trainer.fit()
        seen.append(trainer.seen)
    assert seen[0] == seen[1]


@pytest.mark.parametrize("loader", [[], DataLoader(Points(3), 4, drop_last=True)])
def test_a_validation_loader_of_nothing_is_refused(tmp_path: Path, loader: Any) -> None:
    class Empty(TinyTrainer):
        def configure_dataloaders(self) -> Any:
            return super().configure_dataloaders()[0], loader

    with pytest.raises(ConfigError, match=r"val_dataloader: it has no batches") as caught:
        tiny(tmp_path, Empty, enable=False).fit()
    assert "None instead of a loader means no validation" in str(caught.value)


def test_a_validation_loader_that_can_be_read_once_is_an_error_the_second_time(
    tmp_path: Path,
) -> None:
    class Once(TinyTrainer):
        def configure_dataloaders(self) -> Any:
            return super().configure_dataloaders()[0], (batch_of(index) for index in range(3))

    with pytest.raises(RuntimeError, match="this generator can be read once only"):
        tiny(tmp_path, Once, enable=False).fit()
