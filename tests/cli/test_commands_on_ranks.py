"""Subcommands on two ranks: rank 0 alone speaks, each writes what is its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from programs import TRAIN, run_script, write

pytestmark = pytest.mark.usefixtures("program")

RANKS = ["--device_parameters.devices", "2", "--device_parameters.strategy"]
RUN = Path("runs/default/default/a")


def test_each_rank_writes_its_predictions() -> None:
    # Each rank reads the configuration itself: a model that differed would not predict the same.
    words = ["predict", "--output", "out/p.pt", "--checkpoint_parameters.enable=false"]
    done = run_script("train.py", *words, "--batch_size=2", *RANKS, "ddp")
    assert done.status == 0, done.err
    done = run_script("train.py", *words[:2], "whole.pt", *words[3:], "--batch_size=4")
    assert done.status == 0, done.err
    parts = [torch.load(f"out/p.rank-{rank}.pt") for rank in range(2)]
    assert [[tuple(one.shape) for one in part] for part in parts] == [[(2, 1)] * 4] * 2
    # A batch of two of each rank is the two halves of a batch of four.
    batches = [torch.cat(halves).tolist() for halves in zip(*parts, strict=True)]
    assert batches == [one.tolist() for one in torch.load("whole.pt")]


def test_a_strategy_that_starts_ranks_elsewhere_has_no_predictions_to_write() -> None:
    done = run_script("train.py", "predict", "--output", "p.pt", *RANKS, "ddp_fork")
    assert done.status == 2
    assert "predict returns a part on each rank" in done.err
    assert "Traceback" not in done.err
    assert not Path("p.pt").exists()


@pytest.mark.parametrize("strategy", ["ddp", "ddp_fork"])
def test_fit_and_what_follows_speak_once(strategy: str) -> None:
    switch = ["--optimizer.momentum", "0.5", "--optimizer", "Adam"]
    words = ["fit", "--experiment", "a", "--then", "test", *switch]
    done = run_script("train.py", *words, *RANKS, strategy)
    assert done.status == 0, done.err
    assert done.err.count("Adam instead of SGD drops momentum") == 1
    lines = done.out.splitlines()
    assert len([one for one in lines if one.startswith("done at step")]) == 1
    (result,) = [one for one in lines if one.startswith("test/loss ")]
    alone = run_script("train.py", "test", "--experiment", "a", *switch)
    assert result in alone.out.splitlines()


def test_a_mistake_is_told_once() -> None:
    write("train.py", TRAIN)
    done = run_script("train.py", "fit", "--batch_sizes", "3", *RANKS, "ddp")
    assert done.status == 2
    assert done.err == (
        "train.py: error: options: there is no --batch_sizes; did you mean --batch_size?\n"
        "'train.py fit --help' lists the options.\n"
    )
    assert not Path("runs").exists()
