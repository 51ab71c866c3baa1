"""1 is one, 1.0 is all of them, 0.25 a quarter: of the steps of an epoch and of a validation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import (
    Points,
    RecordingCallback,
    TinyTrainer,
    differences,
    exact_state,
    run_ranks,
    tiny,
    tiny_config,
)
from torch.utils.data import DataLoader, IterableDataset, Sampler

from dream_trainer import TrainingParameters, plan_run
from dream_trainer.errors import ConfigError

# A run seeds the global streams.
pytestmark = pytest.mark.may_leave("rng")


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(Points(24))


class Streaming(TinyTrainer):
    def configure_dataloaders(self) -> Any:
        return DataLoader(Stream(), 4), DataLoader(Stream(), 4)


class Growing(Sampler[list[int]]):
    """One batch more in each epoch: 4, 5, 6, ..."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        return iter([[index, index + 1] for index in range(4 + self.epoch)])


class Uneven(TinyTrainer):
    def configure_dataloaders(self) -> Any:
        return DataLoader(Points(24, augment=True), batch_sampler=Growing()), None


class Counting(TinyTrainer):
    """Writes down how many steps of the run it is told of in setup, as schedules ask."""

    def configure_schedulers(self) -> Any:
        self.told = self.num_training_steps
        return super().configure_schedulers()


CASES = [(1, 1, 1), (2, 1, 2), (1.0, 1, 6), (0.5, 1, 3), (0.25, 1, 2), (0.01, 1, 1),
         (1, 4, 1), (1.0, 4, 2), (0.5, 4, 1), (0.51, 4, 2), (7, 1, 6)]  # fmt: skip


@pytest.mark.parametrize(("value", "accumulation", "steps"), CASES)
def test_an_epoch_has_so_many_steps_and_everybody_says_so(
    tmp_path: Path, value: float, accumulation: int, steps: int
) -> None:
    given: dict[str, Any] = {
        "train_steps_per_epoch": value,
        "gradient_accumulation_steps": accumulation,
        "n_epochs": 2,
        "has_validation": False,
        "enable": False,
    }
    trainer = tiny(tmp_path, Counting, **given)  # 6 batches
    trainer.fit()
    assert (trainer.global_step, trainer.current_epoch) == (2 * steps, 2)
    assert trainer.told == trainer.num_training_steps == 2 * steps
    plan = plan_run(Counting, tiny_config(tmp_path, **given), 1)
    assert (plan.steps.per_epoch, plan.steps.total) == (steps, 2 * steps)


@pytest.mark.parametrize(("value", "batches"), [(1, 1), (0.34, 2), (0.1, 1), (9, 3), (1.0, 3)])
def test_a_validation_has_so_many_batches(tmp_path: Path, value: float, batches: int) -> None:
    recording = RecordingCallback()
    given = {"val_steps_per_epoch": value, "n_epochs": 2, "enable": False}
    trainer = tiny(tmp_path, callbacks={"recording": recording}, **given)  # 3 batches
    trainer.fit()
    assert recording.calls.count("pre_validation_step") == 2 * batches
    plan = plan_run(TinyTrainer, tiny_config(tmp_path, **given), 1)
    assert plan.steps.val_batches in (batches, None)
    assert (plan.steps.val_batches is None) is (type(value) is float and value == 1)


def test_a_fraction_is_what_its_digits_say() -> None:
    for per_cent in range(1, 101):
        parameters = TrainingParameters(
            train_steps_per_epoch=per_cent / 100, val_steps_per_epoch=per_cent / 100
        )
        whole = None if per_cent == 100 else 7_000_000 * per_cent
        assert parameters.step_limit(1_400_000_000, 2) == whole
        assert parameters.val_batch_limit(700_000_000) == whole


@pytest.mark.parametrize("name", ["train_steps_per_epoch", "val_steps_per_epoch"])
def test_more_than_the_whole_is_refused_and_both_meanings_are_named(name: str) -> None:
    unit = "steps" if name.startswith("train") else "batches"
    with pytest.raises(ConfigError) as caught:
        TrainingParameters(**{name: 2.0})
    assert caught.value.problems == (
        f"{name}=2.0 is more than the whole, which is 1.0: write 2 for 2 {unit} without a decimal "
        "point, or a fraction up to 1.0",
    )
    with pytest.raises(ConfigError, match=rf"write a number of {unit} without a decimal point"):
        TrainingParameters(**{name: 1.5})
    for wrong in (0, 0.0, -0.5, -1, True, "1", float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="neither a whole number above 0 nor a fraction up"):
            TrainingParameters(**{name: wrong})


@pytest.mark.parametrize(
    ("name", "loader"),
    [("train_steps_per_epoch", "train"), ("val_steps_per_epoch", "validation"),
     ("overfit_batches", "train")],
)  # fmt: skip
def test_a_fraction_of_an_unknown_length_is_refused_before_anything_runs(
    tmp_path: Path, name: str, loader: str
) -> None:
    for make in (
        lambda config: Streaming(config).fit(),
        lambda config: plan_run(Streaming, config, 1),
    ):
        with pytest.raises(ConfigError) as caught:
            make(tiny_config(tmp_path, **{name: 0.5, "max_steps": 4}))
        said = " ".join(str(caught.value).split())
        assert f"{name}=0.5 is a fraction of an epoch, and the {loader} loader cannot tell" in said
        assert "Give a whole number of" in said
    assert list(tmp_path.iterdir()) == []


def test_the_whole_of_an_unknown_length_is_what_there_is(tmp_path: Path) -> None:
    trainer = tiny(tmp_path, Streaming, train_steps_per_epoch=1.0, val_steps_per_epoch=1.0)
    trainer.fit()
    assert trainer.global_step == 12


@pytest.mark.parametrize(
    ("kind", "given", "steps"),
    [
        (TinyTrainer, {"train_steps_per_epoch": 0.6}, 4 + 4 + 4),
        (TinyTrainer, {"train_steps_per_epoch": 0.5, "gradient_accumulation_steps": 2}, 2 + 2 + 2),
        (Uneven, {"train_steps_per_epoch": 0.75}, 3 + 4 + 5),
    ],
)
def test_a_run_cut_at_every_step_is_one_run(
    tmp_path: Path, kind: type[TinyTrainer], given: dict[str, Any], steps: int
) -> None:
    given = given | {"n_epochs": 3, "val_steps_per_epoch": 0.5, "dropout": 0.3, "augment": True}
    straight = tiny(tmp_path, kind, experiment="straight", **given)
    straight.fit()
    assert straight.global_step == steps
    for step in [*range(1, steps), None]:
        cut = tiny(tmp_path, kind, experiment="cut", max_steps=step, **given)
        cut.fit()
    assert differences(exact_state(straight), exact_state(cut)) == []
    one, other = ((t.run_directory / "metrics.jsonl").read_bytes() for t in (straight, cut))
    assert one == other


def _on_a_rank(root: str) -> tuple[int, int, int, list[list[int]]]:
    trainer = tiny(
        root, Counting, experiment="ranks", n_epochs=2, train_steps_per_epoch=0.5, num_samples=26,
        val_steps_per_epoch=0.5, enable=False,
    )  # fmt: skip
    trainer.fit()
    return trainer.global_step, trainer.told, trainer.num_training_steps, trainer.seen


@pytest.mark.distributed
def test_ranks_agree_on_a_fraction(tmp_path: Path) -> None:
    ranks = run_ranks(2, _on_a_rank, str(tmp_path))
    # 26 samples are 4 batches on each of 2 ranks, the last one of a single sample.
    assert [rank[:3] for rank in ranks] == [(4, 4, 4)] * 2
    assert [len(rank[3]) for rank in ranks] == [4, 4]
    plan = plan_run(
        Counting,
        tiny_config(tmp_path, n_epochs=2, train_steps_per_epoch=0.5, num_samples=26),
        2,
    )
    assert (plan.steps.per_epoch, plan.steps.total) == (2, 4)
