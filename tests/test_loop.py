"""The loop calls what the drawing in the docs says, in that order."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import RecordingCallback, tiny

from dream_trainer.callbacks import Callback
from dream_trainer.callbacks.callback import HOOKS

# A run seeds the global streams.
pytestmark = pytest.mark.may_leave("rng")

DRAWING = Path(__file__).parents[1] / "docs" / "_include" / "lifecycle.txt"
EPOCHS, BATCHES, WINDOW, VAL_BATCHES = 2, 3, 2, 3

Line = tuple[str, list["Line"]]  # type: ignore[misc]


def parse(text: str) -> list[Line]:
    """Indentation to a tree of lines."""
    top: list[Line] = []
    stack = [(-1, top)]
    for line in filter(str.strip, text.splitlines()):
        depth = len(line) - len(line.lstrip())
        while stack[-1][0] >= depth:
            stack.pop()
        entry: Line = (line.strip(), [])
        stack[-1][1].append(entry)
        stack.append((depth, entry[1]))
    return top


class Interpreter:
    """Runs the drawing for a run of known size."""

    def __init__(self, text: str, val_every_n_steps: int | None, val_every_n_epochs: int | None):
        lines = parse(text)
        names = ("validation:",)
        self.main = [
            line
            for line in lines
            if line[0] not in names and not line[0].startswith(("instead", "test,", "predict,"))
        ]
        self.others = {name.partition(",")[0]: body for name, body in lines}
        self.parts = {name[:-1]: body for name, body in lines if name in names}
        self.val_every_n_steps, self.val_every_n_epochs = val_every_n_steps, val_every_n_epochs
        self.step = self.epoch = self.batch = self.validated = 0

    def run(self, lines: list[Line] | None = None) -> Iterator[str]:
        for line, body in self.main if lines is None else lines:
            if line in HOOKS:
                yield line
                self.step += line == "post_optimizer_step"
            elif line in self.parts:
                self.validated = self.step
                yield from self.run(self.parts[line])
            elif line == "for each epoch:":
                for self.epoch in range(EPOCHS):
                    yield from self.run(body)
            elif line == "for each batch:":
                for self.batch in range(BATCHES):
                    yield from self.run(body)
            elif re.fullmatch("for each (validation batch|test batch|batch to predict on):", line):
                for _ in range(VAL_BATCHES):
                    yield from self.run(body)
            elif line.startswith("if "):
                if self.holds(line.removeprefix("if ").rstrip(":")):
                    yield from self.run(body)
            else:
                assert re.fullmatch(r"\(.+\)", line), f"neither a hook nor an action: {line}"

    def holds(self, condition: str) -> bool:
        if condition == "the batch ends its window":
            return (self.batch + 1) % WINDOW == 0 or self.batch + 1 == BATCHES
        every, now = {
            "validation is due after this step": (self.val_every_n_steps, self.step),
            "validation is due after this epoch": (self.val_every_n_epochs, self.epoch + 1),
        }[condition]
        return every is not None and now % every == 0 and self.validated != self.step


@pytest.mark.parametrize(
    ("every_n_steps", "every_n_epochs"), [(None, 1), (1, None), (3, 1), (2, 1), (None, 2)]
)
def test_a_run_calls_the_hooks_of_the_drawing(
    tmp_path: Path, every_n_steps: int | None, every_n_epochs: int | None
) -> None:
    recording = RecordingCallback()
    trainer = tiny(
        tmp_path,
        callbacks={"recording": recording},
        n_epochs=EPOCHS,
        num_samples=BATCHES * 4,
        gradient_accumulation_steps=WINDOW,
        val_every_n_steps=every_n_steps,
        val_every_n_epochs=every_n_epochs,
        num_sanity_val_steps=1,
        enable=False,
    )
    trainer.fit()
    drawn = Interpreter(DRAWING.read_text(encoding="utf-8"), every_n_steps, every_n_epochs)
    assert recording.calls == list(drawn.run())
    assert trainer.global_step == 4


@pytest.mark.parametrize("method", ["test", "predict"])
def test_what_follows_a_run_calls_the_hooks_of_the_drawing(tmp_path: Path, method: str) -> None:
    recording = RecordingCallback()
    trainer = tiny(tmp_path, callbacks={"recording": recording}, enable=False)
    trainer.predict_step = lambda batch, batch_idx: batch["x"]
    loader = trainer.configure_dataloaders()[1]
    getattr(trainer, method)(loader)
    drawn = Interpreter(DRAWING.read_text(encoding="utf-8"), None, None)
    after_setup = recording.calls.index("post_setup") + 1
    assert recording.calls[after_setup:] == [*drawn.run(drawn.others[method]), "close"]


def test_the_drawing_has_every_hook_and_no_other() -> None:
    words = {line.strip() for line in DRAWING.read_text(encoding="utf-8").splitlines()}
    assert set(HOOKS) <= words
    names = {word for word in words if re.fullmatch(r"(pre|post|on)_\w+", word)}
    assert names <= set(HOOKS)


def test_hooks_tell_the_place_they_are_called_at(tmp_path: Path) -> None:
    recording = RecordingCallback()
    trainer = tiny(
        tmp_path,
        callbacks={"recording": recording},
        n_epochs=2,
        num_samples=8,
        has_validation=False,
        enable=False,
    )
    trainer.fit()
    start = [p[0] for p in recording.places].index("pre_epoch")
    assert recording.places[start:] == [
        ("pre_epoch", 0, 0, None),
        ("pre_train_epoch", 0, 0, None),
        ("pre_train_step", 0, 0, 0),
        ("pre_optimizer_step", 0, 0, None),
        ("post_optimizer_step", 1, 0, None),
        ("post_train_step", 1, 0, 0),
        ("on_boundary", 1, 0, None),
        ("pre_train_step", 1, 0, 1),
        ("pre_optimizer_step", 1, 0, None),
        ("post_optimizer_step", 2, 0, None),
        ("post_train_step", 2, 0, 1),
        ("on_boundary", 2, 0, None),
        ("post_train_epoch", 2, 0, None),
        ("post_epoch", 2, 0, None),
        ("on_boundary", 2, 1, None),
        ("pre_epoch", 2, 1, None),
        ("pre_train_epoch", 2, 1, None),
        ("pre_train_step", 2, 1, 0),
        ("pre_optimizer_step", 2, 1, None),
        ("post_optimizer_step", 3, 1, None),
        ("post_train_step", 3, 1, 0),
        ("on_boundary", 3, 1, None),
        ("pre_train_step", 3, 1, 1),
        ("pre_optimizer_step", 3, 1, None),
        ("post_optimizer_step", 4, 1, None),
        ("post_train_step", 4, 1, 1),
        ("on_boundary", 4, 1, None),
        ("post_train_epoch", 4, 1, None),
        ("post_epoch", 4, 1, None),
        ("on_boundary", 4, 2, None),
        ("post_fit", 4, 2, None),
        ("close", 4, 2, None),
    ]


def test_pre_fit_comes_before_sanity_validation(tmp_path: Path) -> None:
    events: list[str] = []

    class Note(Callback):
        def pre_fit(self, trainer: object) -> None:
            events.append("pre_fit")

    trainer = tiny(tmp_path, callbacks={"note": Note()}, num_sanity_val_steps=1, enable=False)
    step = trainer.validation_step
    trainer.validation_step = lambda *args: events.append("validation_step") or step(*args)
    trainer.fit()
    assert events[:2] == ["pre_fit", "validation_step"]
