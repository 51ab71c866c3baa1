from __future__ import annotations

import pytest

from dream_trainer.configs import CheckpointParameters
from dream_trainer.errors import ConfigError


def test_all_problems_are_reported_at_once() -> None:
    wrong = {
        "every_n_steps": 0,
        "every_n_epochs": -1,
        "keep_every_n_steps": 0.5,
        "every_n_minutes": 0.0,
        "mode": "lowest",
        "keep_last": 0,
        "keep_top_k": -1,
        "init_rename": {"a": True, "b": [], "c": None, "d": "", 0: 1},
    }
    with pytest.raises(ConfigError) as caught:
        CheckpointParameters(**wrong)
    assert [problem.split("=")[0] for problem in caught.value.problems] == [
        *list(wrong)[:-1],
        "init_rename is set and init_from is not: there is nothing to rename",
        "init_rename: 'a': True is neither a name nor null",
        "init_rename: 'b': [] is neither a name nor null",
    ]
    assert str(caught.value).startswith("checkpoint_parameters:\n  - every_n_steps=0")


def test_one_problem_is_one_line() -> None:
    with pytest.raises(ConfigError) as caught:
        CheckpointParameters(keep_last=0)
    assert (
        str(caught.value) == "checkpoint_parameters: keep_last=0: the newest checkpoint must stay"
    )


def test_the_defaults_are_those_of_the_contract() -> None:
    parameters = CheckpointParameters()
    assert (parameters.enable, parameters.every_n_epochs, parameters.every_n_steps) == (
        True,
        1,
        None,
    )
    assert (parameters.keep_last, parameters.keep_top_k, parameters.mode) == (2, 1, "min")
    assert (parameters.resume, parameters.init_from, parameters.async_save) == ("auto", None, True)


def test_nothing_needs_to_be_kept_for_its_value() -> None:
    assert CheckpointParameters(keep_top_k=0).keep_top_k == 0
