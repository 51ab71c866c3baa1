"""What is shipped for tests of users' own does what it says."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from dream_trainer.testing import (
    RankError,
    RecordingCallback,
    TinyTrainer,
    differences,
    exact_state,
    flat_state,
    run_ranks,
    tiny_config,
    tiny_trainer,
)

# A run seeds the global streams.
pytestmark = pytest.mark.may_leave("rng")


def test_a_tiny_run_has_six_steps_an_epoch_and_all_that_a_run_has(tmp_path: Path) -> None:
    recording = RecordingCallback()
    trainer = tiny_trainer(tmp_path, callbacks={"recording": recording}, n_epochs=2)
    trainer.fit()
    assert trainer.global_step == 12
    assert recording.calls.count("post_validation_epoch") == 2
    assert recording.places[recording.calls.index("post_train_step")] == (
        "post_train_step",
        1,
        0,
        0,
    )
    assert sum(one.numel() for one in trainer.net.parameters()) == 41
    assert (trainer.run_directory / "metrics.jsonl").exists()


def test_options_go_to_the_part_that_has_them(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, max_steps=3, keep_last=5, dp_shard=2, dropout=0.5, seed=1)
    assert config.training_parameters.max_steps == 3
    assert config.training_parameters.n_epochs == 2
    assert config.checkpoint_parameters.keep_last == 5
    assert config.device_parameters.dp_shard == 2
    assert (config.dropout, config.seed) == (0.5, 1)
    with pytest.raises(TypeError, match="no_such"):
        tiny_config(tmp_path, no_such=1)


def test_states_are_compared_to_the_bit(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, max_steps=2, enable=False)
    trainer.fit()
    before = exact_state(trainer)
    with torch.no_grad():
        weight = trainer.net.get_parameter("0.weight")
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))
    assert differences(before, exact_state(trainer)) == ["/models/net/0.weight"]
    assert flat_state({"a": [1, {"b": 2}]}) == {"/a/0": 1, "/a/1/b": 2}
    assert flat_state(torch.tensor(0.0)) != flat_state(torch.tensor(-0.0))


@pytest.mark.distributed
def test_ranks_return_what_they_found(tmp_path: Path) -> None:
    def on_rank() -> tuple[int, int, bool, dict[str, Any]]:
        trainer = tiny_trainer(tmp_path, TinyTrainer, max_steps=1, enable=False, dp_shard=2)
        trainer.fit()
        weight = trainer.net.get_parameter("0.weight")
        state = flat_state(trainer.state_dict()["models"])
        return trainer.world.rank, trainer.world.size, isinstance(weight, DTensor), state

    one, other = run_ranks(2, on_rank)
    assert (one[:3], other[:3]) == ((0, 2, True), (1, 2, True))
    assert one[3]["/net/0.weight"][1] == (8, 3)  # whole
    assert one[3] == other[3]


@pytest.mark.distributed
def test_a_failing_rank_ends_the_others_and_is_named() -> None:
    def on_rank() -> None:
        if os.environ["RANK"] == "1":
            raise ZeroDivisionError("on purpose")

    with pytest.raises(RankError, match=r"(?s)rank 1: .*ZeroDivisionError: on purpose"):
        run_ranks(2, on_rank)


@pytest.mark.distributed
def test_a_rank_that_dies_or_hangs_is_named() -> None:
    def on_rank() -> None:
        if os.environ["RANK"] == "1":
            os._exit(7)

    with pytest.raises(RankError, match=r"rank 1: died with exit code 7"):
        run_ranks(2, on_rank)
    with pytest.raises(RankError, match=r"rank 0: not done after 1 s"):
        run_ranks(1, time.sleep, 60, time_limit=1.0)
