"""Which rank gets which samples and draws, also when a run moves to other ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import LAYOUTS, BlocksTrainer, Layout, in_double, laid_out
from support import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.may_leave("rng")]

#: Six steps an epoch, the last one of eleven samples.
OPTIONS: dict[str, Any] = {
    "samples_per_batch": 8,
    "global_batch_size": 16,
    "num_samples": 91,
    "augment": True,
    "n_epochs": None,
    "val_every_n_epochs": None,
}

#: A run's life, with its last step there; each move is inside an epoch.
MOVES = [
    (Layout("ddp of four", 4, {"dp_replicate": 4}), 4),
    (LAYOUTS["fsdp"], 8),
    (LAYOUTS["single"], 10),
    (LAYOUTS["hsdp"], 14),
    (LAYOUTS["fsdp-tp"], 16),
]

Seen = dict[int, list[int]]


def life(root: Path, layout: Layout, experiment: str, max_steps: int) -> tuple[Seen, Any]:
    """Continue a run of that name: this rank's samples by step, and the values of its steps."""
    in_double()
    options = {"enable": True, "experiment": experiment, "max_steps": max_steps}
    trainer = laid_out(root, layout, **OPTIONS | options)
    trainer.fit()
    rows = [row for row in trainer.logger.rows if "train/loss" in row]
    return trainer.seen_by_step, rows


def test_a_run_that_moves_takes_the_steps_of_one_that_stays(tmp_path: Path) -> None:
    ((expected, values),) = run_ranks(1, life, tmp_path, LAYOUTS["single"], "stays", MOVES[-1][1])
    seen: dict[int, list[int]] = {}
    rows: list[dict[str, float]] = []
    for layout, max_steps in MOVES:
        ranks = run_ranks(layout.size, life, tmp_path, layout, "moves", max_steps)
        rows += ranks[0][1]
        tp_size = layout.size // layout.dp_size
        for rank, (of_rank, _) in enumerate(ranks):
            assert (
                of_rank == ranks[rank - rank % tp_size][0]
            )  # shared inside a tensor-parallel group
            for step, indices in of_rank.items() if rank % tp_size == 0 else ():
                seen.setdefault(step, []).extend(indices)
    assert {step: sorted(indices) for step, indices in seen.items()} == {
        step: sorted(indices) for step, indices in expected.items()
    }
    assert {len(indices) for indices in expected.values()} == {16, 11}
    assert len(rows) == len(values) == MOVES[-1][1]
    for one, other in zip(values, rows, strict=True):
        assert one == pytest.approx(other, rel=1e-10)


class Draws(BlocksTrainer):
    """Remembers what dropout would draw after each step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.draws: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        result = super().training_step(batch, batch_idx)
        self.draws.append(float(torch.rand(())))
        return result


def with_dropout(root: Path, layout: str) -> tuple[list[float], Any]:
    in_double()
    trainer = laid_out(root, layout, Draws, **OPTIONS | {"dropout": 0.5, "max_steps": 7})
    trainer.fit()
    return trainer.draws, [row for row in trainer.logger.rows if "train/loss" in row]


@pytest.mark.parametrize(("split", "whole"), [("tp", "single"), ("fsdp-tp", "ddp")])
def test_tensor_parallel_ranks_share_dropout_and_data_parallel_ranks_do_not(
    tmp_path: Path, split: str, whole: str
) -> None:
    """Masks on what is replicated must agree, or ranks would compute parts of different models."""
    few = run_ranks(LAYOUTS[whole].size, with_dropout, tmp_path, whole)
    many = run_ranks(LAYOUTS[split].size, with_dropout, tmp_path, split)
    assert [draws for draws, _ in many] == [draws for draws, _ in few for _ in range(2)]
    assert len({tuple(draws) for draws, _ in few}) == LAYOUTS[whole].dp_size
    for one, other in zip(few[0][1], many[0][1], strict=True):
        assert one == pytest.approx(other, rel=1e-10)
