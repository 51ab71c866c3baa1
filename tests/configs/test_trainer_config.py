from __future__ import annotations

import pytest

from dream_trainer.errors import ConfigError
from dream_trainer.trainer import AbstractTrainerConfig


@pytest.mark.parametrize("seed", [0, 1, 2**63, None])
def test_0_and_every_number_above_is_a_seed(seed: int | None) -> None:
    assert AbstractTrainerConfig(seed=seed).seed == seed


def test_names_and_seed_are_checked_together() -> None:
    with pytest.raises(ConfigError) as caught:
        AbstractTrainerConfig(project="a/b", group="..", experiment="", seed=-1)
    assert [problem.split("=")[0] for problem in caught.value.problems] == [
        "project",
        "group",
        "experiment",
        "seed",
    ]
