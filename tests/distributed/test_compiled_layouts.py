"""Compiled blocks train like plain ones in every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from layouts import LAYOUTS, BlocksTrainer, in_double, laid_out
from support import run_ranks
from torch import nn

pytestmark = [pytest.mark.distributed, pytest.mark.may_leave("rng")]


class Compiled(BlocksTrainer):
    """With the front of the compiler, which sees the hooks; its code generator takes minutes."""

    num_compiled = 0

    def apply_compile(self, model: nn.Module) -> None:
        def compiler(graph: Any, inputs: Any) -> Any:
            self.num_compiled += 1
            return graph.forward

        for block in model.blocks:
            block.compile(backend=compiler)


def losses(root: Path, layout: str) -> list[list[float]]:
    in_double()
    curves = []
    for compiles in (False, True):
        options = {"max_steps": 3, "gradient_accumulation_steps": 2, "has_validation": False}
        trainer = laid_out(root, layout, Compiled, compile_model=compiles, **options)
        trainer.fit()
        assert bool(trainer.num_compiled) == compiles
        curves.append([row["train/loss"] for row in trainer.logger.rows if "train/loss" in row])
    return curves


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_blocks_train_like_plain_ones(tmp_path: Path, layout: str) -> None:
    plain, compiled = run_ranks(LAYOUTS[layout].size, losses, tmp_path, layout)[0]
    assert len(compiled) == 3
    assert compiled == pytest.approx(plain, rel=1e-10)
