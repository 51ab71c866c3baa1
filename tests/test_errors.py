from __future__ import annotations

import pickle

import pytest

from dream_trainer.errors import CheckpointError, ConfigError, ProblemsError, StateError


def test_one_problem_is_one_line_and_many_are_a_list() -> None:
    assert str(ConfigError("place", ["one"])) == "place: one"
    assert str(ConfigError("place", ["one", "two"])) == "place:\n  - one\n  - two"


def test_the_next_move_is_the_last_line() -> None:
    assert str(ConfigError("place", ["one"], "Do it.")).splitlines()[-1] == "Do it."


@pytest.mark.parametrize("kind", [ConfigError, StateError, CheckpointError])
def test_an_error_survives_the_way_to_another_rank(kind: type[ProblemsError]) -> None:
    error = kind("place", ["one", "two"], "Do it.")
    other = pickle.loads(pickle.dumps(error))
    assert type(other) is kind
    assert str(other) == str(error)
    assert (other.place, other.problems, other.next_move) == ("place", ("one", "two"), "Do it.")
