"""Lengths, ends and orders of loaders on real ranks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from support import Points, TinyTrainer, run_ranks, tiny
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, RandomSampler, Sampler

from dream_trainer.configs import DeviceParameters, TrainingParameters
from dream_trainer.data import ResumableLoader
from dream_trainer.errors import ConfigError
from dream_trainer.trainer.loaders import adopt_loader, count_training_steps
from dream_trainer.world import DreamWorld

pytestmark = pytest.mark.distributed


def batch_of(index: int) -> dict[str, torch.Tensor]:
    x = torch.full((2, 3), float(index))
    return {"x": x, "y": x[:, :1].sin(), "index": torch.full((2,), index)}


class Stream:
    """No length."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __iter__(self) -> Iterator[Any]:
        return (batch_of(index) for index in range(self.length))


class Sized(Stream):
    def __len__(self) -> int:
        return self.length


class Stateful(Sized):
    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""


class Shards(IterableDataset[Any]):
    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return 2 * self.length

    def __iter__(self) -> Iterator[Any]:
        return iter(Points(2 * self.length))


class Ranked(TinyTrainer):
    """Loaders that depend on the rank; remembers what it validates on."""

    def __init__(self, config: Any, train: Callable[[int], Any], val: Callable[[int], Any]) -> None:
        super().__init__(config)
        self.train, self.val = train, val
        self.validated: list[list[int]] = []
        self.counted: list[int | None] = []

    def configure_dataloaders(self) -> Any:
        return self.train(self.world.rank), self.val(self.world.rank)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.counted.append(self.loop.train_loader.num_samples)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.validated.append(batch["index"].tolist()[: self.loop.val_loader.num_samples])
        return super().validation_step(batch, batch_idx)


def on_ranks(
    root: Path,
    train: Callable[[int], Any],
    val: Callable[[int], Any] = lambda rank: None,
    *,
    size: int = 2,
    **options: Any,
) -> list[Any]:
    """Fit on so many ranks: the error's text, or what the trainer saw."""

    def rank() -> Any:
        options.setdefault("n_epochs", 1)
        trainer = Ranked(tiny(root, devices=size, enable=False, **options).config, train, val)
        try:
            trainer.fit()
        except ConfigError as error:
            return trainer.global_step, str(error)
        return trainer.seen, trainer.counted, trainer.validated

    return run_ranks(size, rank)


def test_more_ranks_than_samples_train_and_validate_on_each_once(tmp_path: Path) -> None:
    ranks = on_ranks(
        tmp_path,
        lambda rank: DataLoader(Points(5), 2, shuffle=True),
        lambda rank: DataLoader(Points(2), 2),
        size=3,
    )
    seen = [seen for seen, *_ in ranks]
    counted = [counted for _, counted, _ in ranks]
    assert [len(batches) for batches in seen] == [1, 1, 1]
    assert counted == [[2], [2], [1]]
    assert sorted(i for rank in seen for batch in rank for i in batch) == list(range(5))
    assert [validated for *_, validated in ranks] == [[[0]], [[1]], [[]]]


def test_one_sample_on_two_ranks_counts_once(tmp_path: Path) -> None:
    ranks = on_ranks(tmp_path, lambda rank: DataLoader(Points(1), 4))
    assert [counted for _, counted, _ in ranks] == [[1], [0]]


@pytest.mark.parametrize("kind", [Stream, Sized, Stateful])
def test_iterables_without_a_common_length_end_together(tmp_path: Path, kind: type[Stream]) -> None:
    def loader(rank: int) -> Any:
        one = kind(4)
        one.length += rank if kind is Stream else 0
        return one

    ranks = on_ranks(tmp_path, loader, loader, n_epochs=2)
    for seen, _, validated in ranks:
        assert [batch[0] for batch in seen] == [0, 1, 2, 3] * 2
        assert [batch[0] for batch in validated] == [0, 1, 2, 3] * 2


DISAGREE: dict[str, tuple[Callable[[int], Any], str]] = {
    "list": (
        lambda rank: [batch_of(i) for i in range(3 + rank)],
        "numbers of batches (rank 0: 3, rank 1: 4)",
    ),
    "with a length": (
        lambda rank: Sized(3 + rank),
        "numbers of batches (rank 0: 3, rank 1: 4)",
    ),
    "own state": (
        lambda rank: Stateful(3 + rank),
        "numbers of batches (rank 0: 3, rank 1: 4)",
    ),
    "iterable data set": (
        lambda rank: DataLoader(Shards(3 + rank), 2),
        "numbers of batches (rank 0: 3, rank 1: 4)",
    ),
    "map-style": (
        lambda rank: DataLoader(Points(8 + 8 * rank), 4),
        "numbers of batches (rank 0: 1, rank 1: 2)",
    ),
    "map-style, as many batches": (
        lambda rank: DataLoader(Points(7 + rank), 4),
        "numbers of samples (rank 0: 7, rank 1: 8)",
    ),
    "with a length and without": (
        lambda rank: [Sized, Stream][rank](3),
        "numbers of batches (rank 0: 3, rank 1: None)",
    ),
}


@pytest.mark.parametrize("phase", ["train", "val"])
@pytest.mark.parametrize("kind", DISAGREE)
def test_ranks_that_disagree_say_so_before_the_first_step_and_name_the_numbers(
    tmp_path: Path, kind: str, phase: str
) -> None:
    loader, message = DISAGREE[kind]
    good = lambda rank: DataLoader(Points(8), 4)  # noqa: E731
    pair = (loader, good) if phase == "train" else (good, loader)
    for steps, text in on_ranks(tmp_path, *pair):
        assert steps == 0
        assert text.startswith(f"{phase}_dataloader: the ranks have different {message}")


class OfThisRank(Sampler[int]):
    """Divides the data itself, as samplers do that are made for several ranks."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, 8, 2))


class Distributed(DistributedSampler[Any]):
    """A subclass may do anything, so it is asked for its order."""


@pytest.mark.parametrize(
    "sampler",
    [OfThisRank, lambda rank: Distributed(range(8), num_replicas=2, rank=rank)],
    ids=["own", "subclass of DistributedSampler"],
)
def test_a_sampler_that_divides_by_rank_itself_is_refused(
    tmp_path: Path, sampler: Callable[[int], Any]
) -> None:
    """Divided a second time, half of the data would never be seen."""
    for steps, text in on_ranks(
        tmp_path, lambda rank: DataLoader(Points(8), 2, sampler=sampler(rank))
    ):
        assert steps == 0
        assert "the ranks have different orders (checksums) (rank 0: " in text
        assert "Let the sampler give all samples, as with one rank" in text


def test_a_loader_that_fabric_has_wrapped_is_refused_where_it_would_repeat_an_epoch() -> None:
    def rank() -> str:
        fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
        fabric.launch()
        in_order = fabric.setup_dataloaders(DataLoader(range(4)))  # type: ignore[arg-type]
        assert [batch.item() for batch in ResumableLoader(in_order)] == [
            fabric.global_rank,
            2 + fabric.global_rank,
        ]
        shuffled = fabric.setup_dataloaders(DataLoader(range(4), shuffle=True))  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="counts the epochs that it shuffles by from 0"):
            ResumableLoader(shuffled)
        return "refused"

    assert run_ranks(2, rank) == ["refused", "refused"]


def test_a_sampler_that_draws_gives_every_rank_the_same_order(tmp_path: Path) -> None:
    def loader(rank: int) -> Any:
        sampler = RandomSampler(range(8), replacement=True, num_samples=6)
        return DataLoader(Points(8), 3, sampler=sampler)

    first, second = on_ranks(tmp_path, loader)
    assert len(first[0]) == len(second[0]) == 1


def test_drop_last_drops_what_does_not_fill_a_step_on_any_ranks_alike() -> None:
    """Adopted with the run's parameters, as a train loader; others drop batches of all ranks."""

    def rank(name: str, batch_size: int, num_samples: int) -> Any:
        world = DreamWorld(
            DeviceParameters(accelerator="cpu", devices=int(os.environ["WORLD_SIZE"]))
        )
        world.launch()
        parameters = TrainingParameters(n_epochs=1, global_batch_size=8)
        loader = DataLoader(Points(num_samples), batch_size, drop_last=True)
        try:
            adopted = adopt_loader(loader, name, world, 3, parameters)
        except ConfigError as error:
            return str(error)
        steps = count_training_steps(adopted, parameters, world.dp_size)
        return [batch["index"].tolist() for batch in adopted], steps

    (one,) = run_ranks(1, rank, "train_dataloader", 2, 21)
    two = run_ranks(2, rank, "train_dataloader", 2, 21)
    assert [steps for _, steps in (one, *two)] == [2, 2, 2]
    pairs = zip(*(batches for batches, _ in two), strict=True)
    joined = [index for pair in pairs for batch in pair for index in batch]
    assert joined == [index for batch in one[0] for index in batch] == list(range(16))
    ((batches, _),) = run_ranks(1, rank, "val_dataloader", 2, 21)
    assert len(batches) == 10
    (text,) = run_ranks(1, rank, "train_dataloader", 2, 7)
    assert "it has no batches (batch_size 2, 1 ranks, 7 samples, global_batch_size 8)" in text


@pytest.mark.parametrize("phase", ["train", "val"])
def test_a_loader_without_a_batch_on_so_many_ranks_is_refused(tmp_path: Path, phase: str) -> None:
    short = lambda rank: DataLoader(Points(7), 4, drop_last=True)  # noqa: E731
    good = lambda rank: DataLoader(Points(8), 4)  # noqa: E731
    pair = (short, good) if phase == "train" else (good, short)
    for steps, text in on_ranks(tmp_path, *pair):
        assert steps == 0
        assert f"{phase}_dataloader: it has no batches (batch_size 4, 2 ranks, 7 samples)" in text


def test_an_iterable_that_is_empty_on_one_rank_is_an_error_of_training_on_all(
    tmp_path: Path,
) -> None:
    def rank() -> str:
        config = tiny(tmp_path, devices=2, enable=False, n_epochs=1).config
        trainer = Ranked(config, lambda rank: Stream(3 * rank), lambda rank: None)
        with pytest.raises(RuntimeError, match="the train loader gave no batch in epoch 0"):
            trainer.fit()
        return "said"

    assert run_ranks(2, rank) == ["said", "said"]
