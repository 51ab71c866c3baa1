"""The table of features leaves out nothing that a machine can count."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

import dream_trainer
from dream_trainer import callbacks
from dream_trainer.randomness import preserved

PAGE = Path(__file__).parents[1] / "docs" / "features.md"
NAMED = set(re.findall(r"\b[A-Za-z_]\w+\b", PAGE.read_text(encoding="utf-8")))
#: What no user adds to a run.
NOT_FEATURES = {"CallbackList"}


def test_every_callback_of_the_package_is_in_the_table() -> None:
    with preserved():  # loading all of them draws from Python's stream
        public = [
            (name, getattr(module, name))
            for module in (dream_trainer, callbacks)
            for name in module.__all__
        ]
    ours = {
        name
        for name, one in public
        if isinstance(one, type) and issubclass(one, callbacks.Callback)
    }
    assert "CheckpointCallback" in ours
    assert sorted(ours - NAMED - NOT_FEATURES) == [], "say in docs/features.md what stands for it"


def test_every_flag_and_callback_of_lightning_is_in_the_table() -> None:
    pytorch = pytest.importorskip("lightning.pytorch")
    theirs = set(inspect.signature(pytorch.Trainer.__init__).parameters) - {"self"}
    theirs |= set(pytorch.callbacks.__all__)
    assert {"max_epochs", "EarlyStopping"} < theirs
    assert sorted(theirs - NAMED) == []


def test_every_row_says_what_is_here() -> None:
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line[:2] == "| "]
    answers = [row.split(" | ")[-1] for row in rows if row != "| theirs | here |"]
    assert len(answers) > 90
    wrong = [one for one in answers if not re.match(r"\*\*(yes|yours|no)\*\* \S", one)]
    assert wrong == []
