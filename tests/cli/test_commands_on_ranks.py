"""Subcommands on two ranks: rank 0 alone speaks, and what they write is one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from programs import TRAIN, run_script, write

pytestmark = pytest.mark.usefixtures("program")

RANKS = ["--device_parameters.devices", "2", "--device_parameters.strategy"]
RUN = Path("runs/default/default/a")


@pytest.mark.parametrize("strategy", ["ddp", "ddp_fork"])
def test_predictions_of_ranks_are_one_file_in_the_order_of_the_data(strategy: str) -> None:
    # Each rank reads the configuration itself: a model that differed would not predict the same.
    words = ["predict", "--output", "out/p.pt", "--checkpoint_parameters.enable=false"]
    done = run_script("train.py", *words, "--batch_size=3", *RANKS, strategy)
    assert done.status == 0, done.err
    assert done.out.count("out/p.pt: 16 samples") == 1
    assert [path.name for path in Path("out").iterdir()] == ["p.pt"]
    done = run_script("train.py", *words[:2], "whole.pt", *words[3:], "--batch_size=16")
    assert done.status == 0, done.err
    assert torch.allclose(torch.load("out/p.pt"), torch.load("whole.pt"))


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
    monitor = ["--checkpoint_parameters.monitor", "val/loss"]
    words = ["test", "--experiment", "a", "--checkpoint", "last", *switch, *monitor]
    done = run_script("train.py", *words, *RANKS, strategy)
    assert done.status == 0, done.err
    assert done.out.count("test on last: step-") == 1
    assert result in done.out.splitlines()


def test_a_mistake_is_told_once() -> None:
    write("train.py", TRAIN)
    done = run_script("train.py", "fit", "--batch_sizes", "3", *RANKS, "ddp")
    assert done.status == 2
    assert done.err == (
        "train.py: error: options: there is no --batch_sizes; did you mean --batch_size?\n"
        "'train.py fit --help' lists the options.\n"
    )
    assert not Path("runs").exists()
