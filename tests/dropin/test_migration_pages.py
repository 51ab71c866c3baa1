"""What the migration pages show side by side runs as printed."""

from __future__ import annotations

import os
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from support import run_ranks
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import dream_trainer

PAGES = Path(__file__).parents[2] / "docs" / "migrating"


class Net(nn.Linear):
    """Stands for the reader's model."""

    def __init__(self) -> None:
        super().__init__(4, 3)


def blocks(page: str) -> list[str]:
    """Python of a page, on what is here."""
    text = (PAGES / page).read_text(encoding="utf-8")
    found = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert len(found) >= 2
    there = {'accelerator="gpu", devices=4': 'accelerator="cpu", devices=1'}
    for old, new in there.items():
        found = [one.replace(old, new) for one in found]
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("page", sorted(path.name for path in PAGES.glob("*.md")))
def test_both_sides_of_a_page_train(page: str, tmp_path: Path) -> None:
    def rank() -> int:
        os.chdir(tmp_path)
        torch.manual_seed(0)
        x = torch.randn(64, 4)
        public = {name: getattr(dream_trainer, name) for name in dream_trainer.__all__}
        names: dict[str, Any] = {
            **public,
            "torch": torch,
            "F": F,
            "Net": Net,
            "DataLoader": DataLoader,
            "data": TensorDataset(x, x[:, :3].argmax(1)),
        }
        from lightning.fabric import Fabric

        names["Fabric"] = Fabric
        for block in blocks(page):
            if "import Accelerator" in block and find_spec("accelerate") is None:
                print("left out, for it needs: pip install accelerate")
                continue
            exec(compile(block, page, "exec"), names)
        return len(list(tmp_path.glob("runs/**/manifest.json")))

    assert run_ranks(1, rank) > [0]
