"""Predictions come back in the order of the data, whoever made them, all of them or none."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import Points, TinyTrainer, run_ranks, tiny
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from dream_trainer import PredictionWriter, read_predictions
from dream_trainer.coordination import Interrupted
from dream_trainer.errors import ConfigError

pytestmark = pytest.mark.may_leave("rng")

#: No number of ranks that is tested divides it, nor does the batch size.
NUM = 23


class Predicts(TinyTrainer):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        index = batch["index"]
        return {
            "index": index,
            "pair": (self.net(batch["x"]), index.bfloat16()),
            "words": [f"sample {i}" for i in index.tolist()],
        }


def predict(folder: Path, loader: Any, write: Any = "batch", **options: Any) -> None:
    writer = PredictionWriter(folder, write)
    trainer = tiny(folder.parent, Predicts, enable=False, callbacks={"writer": writer}, **options)
    assert trainer.predict(loader, return_predictions=False) == []


def data(shuffle: bool = False) -> DataLoader[Any]:
    return DataLoader(Points(NUM), batch_size=4, shuffle=shuffle)


def expected(folder: Path) -> list[Any]:
    trainer = tiny(folder, Predicts, enable=False)
    whole = Points(NUM)
    made = torch.cat([one["pair"][0] for one in trainer.predict(data())])
    return [
        {
            "index": torch.tensor(i),
            "pair": (made[i], torch.tensor(i).bfloat16()),
            "words": f"sample {i}",
        }
        for i in range(len(whole))
    ]


def same(one: Any, other: Any, rel: float = 0.0) -> bool:
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and bool(torch.allclose(one, other, rtol=rel, atol=rel))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k], rel) for k in one)
    if isinstance(one, (tuple, list)):
        return type(one) is type(other) and all(map(same, one, other, [rel] * len(one)))
    return bool(one == other)


@pytest.mark.parametrize("write", ["batch", "epoch"])
@pytest.mark.parametrize("shuffle", [False, True])
def test_on_one_rank(tmp_path: Path, write: str, shuffle: bool) -> None:
    predict(tmp_path / "p", data(shuffle), write)
    found = read_predictions(tmp_path / "p")
    assert found.indices == list(range(NUM))
    # In a shuffled batch a sample stands in another row of the matrix product.
    assert same(list(found), expected(tmp_path), rel=1e-6 if shuffle else 0.0)
    files = [path.name for path in (tmp_path / "p" / "rank-0000").iterdir()]
    assert len(files) == (6 if write == "batch" else 1)
    together = found.together()
    assert together["index"].tolist() == list(range(NUM))
    assert [tuple(one.shape) for one in together["pair"]] == [(NUM, 1), (NUM,)]
    assert together["words"] == [f"sample {i}" for i in range(NUM)]


LAYOUTS = {
    "ddp of two": (2, {"dp_replicate": 2}),
    "ddp of three": (3, {"dp_replicate": 3}),
    "fsdp": (2, {"dp_replicate": 1, "dp_shard": 2}),
}


def on_ranks(root: Path, sizes: dict[str, int], shuffle: bool) -> None:
    total = 1
    for size in sizes.values():
        total *= size
    predict(root / "p", data(shuffle), devices=total, **sizes)


@pytest.mark.distributed
@pytest.mark.parametrize("layout", LAYOUTS)
def test_on_any_ranks_each_sample_comes_once_in_its_place(tmp_path: Path, layout: str) -> None:
    size, sizes = LAYOUTS[layout]
    run_ranks(size, on_ranks, tmp_path, sizes, layout == "ddp of three")
    assert len(list((tmp_path / "p").glob("rank-*"))) == size
    found = read_predictions(tmp_path / "p")
    assert found.indices == list(range(NUM))
    assert same(list(found), expected(tmp_path), rel=1e-6)


def with_a_filler(root: Path) -> None:
    """13 = 4 * 3 + 1: the last batch is one sample, and two ranks get a filler."""
    loader = DataLoader(Points(13), batch_size=4)
    predict(root / "p", loader, devices=3, dp_replicate=3)


@pytest.mark.distributed
def test_fillers_are_not_written(tmp_path: Path) -> None:
    run_ranks(3, with_a_filler, tmp_path)
    found = read_predictions(tmp_path / "p")
    assert [one["words"] for one in found] == [f"sample {i}" for i in range(13)]


class Named(TinyTrainer):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return batch


def read_back(folder: Path, loader: Any, **options: Any) -> Any:
    writer = PredictionWriter(folder, overwrite=True)
    trainer = tiny(folder.parent, Named, enable=False, callbacks={"writer": writer}, **options)
    trainer.predict(loader, return_predictions=False)
    return read_predictions(folder)


def test_orders_that_others_decide(tmp_path: Path) -> None:
    repeated = read_back(tmp_path / "p", DataLoader(range(9), 2, sampler=[5, 1, 5, 3]))
    assert (list(repeated), repeated.indices) == ([1, 3, 5], [1, 3, 5])
    words = {"a": 1, "b": 2, "c": 3}
    by_word = read_back(tmp_path / "p", DataLoader(words, 2, sampler=["c", "a"]))  # type: ignore[arg-type]
    assert ([int(one) for one in by_word], by_word.indices) == ([3, 1], None)
    dealt = DataLoader(range(9), batch_sampler=[[8, 0, 4], [2]])
    assert [int(one) for one in read_back(tmp_path / "p", dealt)] == [0, 2, 4, 8]
    single = DataLoader([torch.arange(n) for n in (2, 1, 3)], batch_size=None)
    assert [one.tolist() for one in read_back(tmp_path / "p", single)] == [[0, 1], [0], [0, 1, 2]]
    streamed = read_back(tmp_path / "p", [torch.tensor([7, 6]), torch.tensor([5])])
    assert ([int(one) for one in streamed], streamed.indices) == ([7, 6, 5], None)


class Shard(IterableDataset[int]):
    def __init__(self, first: int, count: int) -> None:
        self.first, self.count = first, count

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.first, self.first + self.count))


def streams(root: Path) -> None:
    rank = int(os.environ["RANK"])
    shard = Shard(100 * rank, 4)
    read_back(root / "p", DataLoader(shard, 2), devices=2, dp_replicate=2)


@pytest.mark.distributed
def test_streams_of_ranks_come_rank_after_rank(tmp_path: Path) -> None:
    run_ranks(2, streams, tmp_path)
    found = read_predictions(tmp_path / "p")
    assert [int(one) for one in found] == [0, 1, 2, 3, 100, 101, 102, 103]


# ---------------------------------------------------------------------- what does not work


class Interrupts(Predicts):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return super().predict_step(batch, batch_idx)


def test_an_interrupted_one_leaves_nothing_and_is_not_mixed_with_the_next(tmp_path: Path) -> None:
    folder = tmp_path / "p"
    trainer = tiny(
        tmp_path, Interrupts, enable=False, callbacks={"writer": PredictionWriter(folder)}
    )
    with pytest.raises(Interrupted):
        trainer.predict(data())
    assert not folder.exists()
    with pytest.raises(ConfigError, match=r"\.p\.partial is of a prediction that did not end"):
        read_predictions(folder)
    predict(folder, DataLoader(Points(3), batch_size=4))  # fewer batches than those that were left
    assert [one["words"] for one in read_predictions(folder)] == [
        "sample 0",
        "sample 1",
        "sample 2",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p"]


def test_what_is_there_is_replaced_only_when_asked_for_and_only_by_a_whole_one(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "p"
    predict(folder, data())
    with pytest.raises(ConfigError, match="is there already"):
        predict(folder, data())
    writer = PredictionWriter(folder, overwrite=True)
    trainer = tiny(tmp_path, Interrupts, enable=False, callbacks={"writer": writer})
    with pytest.raises(Interrupted):
        trainer.predict(data())
    assert len(read_predictions(folder)) == NUM
    assert len(read_back(folder, DataLoader(range(5), 2))) == 5
    # Killed between the two renamings of a replacement.
    folder.rename(tmp_path / ".p.replaced")
    with pytest.raises(ConfigError, match="is there already"):
        predict(folder, data())
    assert len(read_predictions(folder)) == 5
    (tmp_path / "mine").mkdir()
    with pytest.raises(ConfigError, match="holds no predictions, so it is not written over"):
        read_back(tmp_path / "mine", data())


def test_a_damaged_folder_is_not_read(tmp_path: Path) -> None:
    predict(tmp_path / "p", data())
    (tmp_path / "p/rank-0000/batch-00000002.pt").write_bytes(b"")
    shutil.rmtree(tmp_path / "p/rank-0000/batch-00000003.pt", ignore_errors=True)
    with pytest.raises(ConfigError, match=r"rank-0000/batch-00000002.pt is missing or has not"):
        read_predictions(tmp_path / "p")


class Wrong(TinyTrainer):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return {"whole": batch["x"].sum(), "cut": batch["x"][:3], "name": ["a"] * 4}


class Foreign(TinyTrainer):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return [Path(str(i)) for i in batch["index"].tolist()]


def test_what_cannot_be_split_or_read_back_is_named(tmp_path: Path) -> None:
    def writing(kind: type[TinyTrainer]) -> Any:
        callbacks = {"writer": PredictionWriter(tmp_path / "p")}
        return tiny(tmp_path, kind, enable=False, callbacks=callbacks)

    with pytest.raises(ValueError, match="for a batch of 4 samples") as error:
        writing(Wrong).predict(data())
    assert "['whole'] has no rows" in str(error.value)
    assert "['cut'] has 3 rows" in str(error.value)
    assert "['name']" not in str(error.value)
    with pytest.raises(TypeError, match=r"the result\[0\] is a PosixPath"):
        writing(Foreign).predict(data())
    with pytest.raises(ConfigError, match="write='always' is no 'batch' or 'epoch'"):
        PredictionWriter(tmp_path, "always")  # type: ignore[arg-type]


def test_memory_does_not_grow_with_what_is_predicted(tmp_path: Path) -> None:
    import gc
    import weakref

    alive: list[int] = []
    made: list[Any] = []

    class Counts(TinyTrainer):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            result = torch.zeros(len(batch["index"]), 100)
            made.append(weakref.ref(result))
            gc.collect()
            alive.append(sum(one() is not None for one in made))
            return result

    callbacks = {"writer": PredictionWriter(tmp_path / "p")}
    trainer = tiny(tmp_path, Counts, enable=False, callbacks=callbacks)
    trainer.predict(data(), return_predictions=False)
    assert alive == [1] * 6
