from __future__ import annotations

import pytest
import torch
from support import run_ranks

from dream_trainer import DreamWorld
from dream_trainer.callbacks.rank_means import RankMeans
from dream_trainer.configs import DeviceParameters
from dream_trainer.metrics import Observations, merge_ranks, totals

pytestmark = pytest.mark.distributed


def flushes(rank: int) -> list[list[Observations]]:
    """Rows as runs have them: other numbers, fewer rows, other names on one rank, fillers."""
    draw = torch.Generator().manual_seed(rank)

    def row(*names: str, weight: float = 3.0 + rank) -> Observations:
        return [(name, torch.rand((), generator=draw).item(), weight) for name in names]

    usual = [[row("loss", "lr") for _ in range(5)] for _ in range(4)]
    return [
        *usual[:2],
        [row("loss", "lr"), row("loss", "lr")],
        [row("loss", "lr"), row("loss", "lr") + row("seen") * (rank == 1)],
        usual[2],
        [row("loss", "lr", weight=0.0 if rank else 2.0), row("loss", "lr", weight=0.0)],
        [[("loss", torch.tensor(0.1 * rank), 2), ("lr", 1, 1), ("lr", 2, 1)]],
        [row("accuracy")],
        [row("accuracy")],
        [[("accuracy", float("nan") if rank == 2 else -0.0, 1.0)]],
        usual[3],
    ]


def test_numbers_alone_give_the_means_that_objects_give_to_the_bit() -> None:
    def rank() -> tuple[int, list[str], list[str]]:
        world = DreamWorld(DeviceParameters(accelerator="cpu", devices=3, strategy="ddp"))
        world.launch()
        own, num_objects = RankMeans(), 0
        gather = world.gather_data_parallel

        def counted(value: object) -> list[object]:
            nonlocal num_objects
            num_objects += 1
            return gather(value)

        world.gather_data_parallel = counted  # type: ignore[method-assign]
        found = [repr(own.of(rows, world)) for rows in flushes(world.rank)]
        parts = [gather(totals(rows)) for rows in flushes(world.rank)]
        expected = [repr([merge_ranks(one) for one in zip(*of, strict=True)]) for of in parts]
        return num_objects, found, expected

    (num_objects, found, expected), *others = run_ranks(3, rank)
    assert found == expected
    assert [one[1] for one in others] == [found] * 2
    # The first, the one with another name, the one whose names are new, and the last.
    assert num_objects == 4
