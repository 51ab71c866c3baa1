from __future__ import annotations

import pytest

from dream_trainer.configs import TrainingParameters
from dream_trainer.errors import ConfigError


def test_all_problems_are_reported_at_once() -> None:
    wrong = {
        "n_epochs": 0,
        "max_steps": -1,
        "gradient_accumulation_steps": 0,
        "val_every_n_epochs": 0,
        "val_every_n_steps": "all",
        "num_sanity_val_steps": -1,
        "train_steps_per_epoch": 1.5,
        "val_steps_per_epoch": 0,
        "overfit_batches": -0.5,
        "max_time": 0.0,
        "gradient_clip_val": -1.0,
        "on_nonfinite": "ignore",
    }
    with pytest.raises(ConfigError) as caught:
        TrainingParameters(**wrong)
    assert [problem.split("=")[0] for problem in caught.value.problems] == list(wrong)


def test_a_run_has_no_limit_unless_it_is_given_one() -> None:
    assert not TrainingParameters().is_limited
    assert TrainingParameters(n_epochs=1).is_limited
    assert TrainingParameters(max_steps=1).is_limited
    assert TrainingParameters(max_time=0.5).is_limited


@pytest.mark.parametrize(
    ("batch_size", "dp_size", "expected"), [(8, 1, 64), (8, 64, 1), (16, 4, 8), (None, 3, 7)]
)
def test_the_accumulation_follows_from_the_global_batch_size(
    batch_size: int | None, dp_size: int, expected: int
) -> None:
    if batch_size is None:
        parameters = TrainingParameters(gradient_accumulation_steps=7)
    else:
        parameters = TrainingParameters(global_batch_size=512)
    assert parameters.accumulation(batch_size, dp_size) == expected


def test_the_samples_of_a_step_are_the_same_on_any_number_of_ranks() -> None:
    parameters = TrainingParameters(global_batch_size=4096)
    for ranks in (1, 8, 512, 4096):
        assert parameters.accumulation(1, ranks) * ranks == 4096


@pytest.mark.parametrize(("batch_size", "dp_size"), [(7, 1), (8, 3), (1024, 1)])
def test_a_global_batch_that_cannot_be_made_is_refused_with_the_next_move(
    batch_size: int, dp_size: int
) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainingParameters(global_batch_size=512).accumulation(batch_size, dp_size)
    place, move = str(caught.value).splitlines()
    assert "global_batch_size=512" in place
    assert f"batch size {batch_size} x {dp_size} data-parallel ranks" in place
    assert move == "Change the loader's batch size, the number of ranks or global_batch_size."


def test_a_global_batch_size_needs_a_loader_that_knows_its_own() -> None:
    with pytest.raises(ConfigError, match=r"Use a DataLoader with batch_size, or set gradient_"):
        TrainingParameters(global_batch_size=512).accumulation(None, 1)


def test_the_accumulation_is_said_once() -> None:
    with pytest.raises(ConfigError, match="leave out gradient_accumulation_steps=2"):
        TrainingParameters(global_batch_size=8, gradient_accumulation_steps=2)


def test_the_accumulation_cannot_be_none() -> None:
    with pytest.raises(ConfigError, match="gradient_accumulation_steps=None"):
        TrainingParameters(gradient_accumulation_steps=None)  # type: ignore[arg-type]


def test_numbers_that_are_none_are_all_named() -> None:
    wrong = {"max_time": "60x", "gradient_clip_val": True, "grace_seconds": -1, "max_steps": True}
    with pytest.raises(ConfigError) as caught:
        TrainingParameters(num_sanity_val_steps="2", **wrong)  # type: ignore[arg-type]
    said = str(caught.value)
    for name in ("num_sanity_val_steps='2'", *(f"{n}={v!r}" for n, v in wrong.items())):
        assert f"{name} is not a" in said
