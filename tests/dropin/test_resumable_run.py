"""Ordinary scripts on Fabric, and the few lines that make each of them go on where it was."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from support import RankError, run_ranks
from torch.optim.optimizer import register_optimizer_step_post_hook

pytestmark = [pytest.mark.may_leave("rng"), pytest.mark.distributed]

SCRIPTS = Path(__file__).parent / "scripts"
IMPORT = "from dream_trainer import CheckpointParameters, ResumableRun"
EVERY = "checkpoints=CheckpointParameters(every_n_steps=3, async_save=False)"
#: Script -> lines that change: what stands there, and what comes instead.
CHANGES = {
    "classify": [
        (
            "    for epoch in range(3):",
            f"    run = ResumableRun(fabric, 'run', model=model, optimizer=optimizer, "
            f"scheduler=scheduler, val=val, {EVERY})\n"
            "    for epoch in run.epochs(3):",
        ),
        ("        for x, y in train:", "        for x, y in run.batches(train):"),
    ],
    "accumulate": [
        (
            "    for _ in range(2):",
            f"    run = ResumableRun(fabric, 'run', model=model, optimizer=optimizer, best=best, "
            f"{EVERY})\n"
            "    for _ in run.epochs(2):",
        ),
        (
            "        for index, (x, y) in enumerate(loader):",
            "        for index, (x, y) in run.batches(loader).enumerate():",
        ),
    ],
    "gan": [
        (
            "    for _ in range(3):",
            "    run = ResumableRun(fabric, 'run', generator=generator, critic=critic, "
            f"for_generator=for_generator, for_critic=for_critic, {EVERY})\n"
            "    for _ in run.epochs(3):",
        ),
        ("        for (x,) in loader:", "        for (x,) in run.batches(loader):"),
    ],
    "stream": [
        (
            "    for tokens in stream:",
            "    run = ResumableRun(fabric, 'run', model=model, optimizer=optimizer, "
            f"scheduler=scheduler, {EVERY})\n"
            "    for tokens in run.batches(stream):",
        ),
    ],
    "workers": [
        (
            "    for _ in range(2):",
            "    run = ResumableRun(fabric, 'run', model=model, optimizer=optimizer, "
            f"average=average, {EVERY})\n"
            "    for _ in run.epochs(2):",
        ),
        ("        for x, y in loader:", "        for x, y in run.batches(loader):"),
    ],
    "policy": [
        (
            "    for _ in range(16):",
            "    run = ResumableRun(fabric, 'run', policy=policy, optimizer=optimizer, "
            "memory=memory, checkpoints=CheckpointParameters(every_n_epochs=3, async_save=False))\n"
            "    for _ in run.epochs(16):",
        ),
    ],
}


def changed(name: str) -> str:
    """A script with its few lines changed."""
    before = (SCRIPTS / f"{name}.py").read_text()
    text = before.replace("\nfrom lightning.fabric import Fabric\n", f"\n{IMPORT}\n\\g<0>", 1)
    text = text.replace("\\g<0>", "from lightning.fabric import Fabric\n", 1)
    for old, new in CHANGES[name]:
        assert text.count(f"{old}\n") == 1, old
        text = text.replace(f"{old}\n", f"{new}\n")
    added = [
        line
        for line in difflib.ndiff(before.splitlines(), text.splitlines())
        if line.startswith("+ ")
    ]
    assert 1 < len(added) <= 5
    return text


def script(source: str, folder: Path, kill_at: int = 0) -> tuple[list[str], str]:
    """Run a script as a rank of its program; its lines, and a hash of what it saved."""
    os.chdir(folder)
    if os.environ["WORLD_SIZE"] != "1":  # as `fabric run` does
        os.environ |= {"LT_ACCELERATOR": "cpu", "LT_STRATEGY": "ddp", "LT_DEVICES": "2"}
    lines = folder / f"lines-{os.environ['RANK']}"
    lines.unlink(missing_ok=True)
    num_steps = 0

    def count(*_: Any) -> None:
        nonlocal num_steps
        num_steps += 1
        if num_steps == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    register_optimizer_step_post_hook(count)
    with lines.open("w", buffering=1) as out, contextlib.redirect_stdout(out):
        exec(compile(source, "script.py", "exec"), {"__name__": "__main__"})
    told = [line for line in lines.read_text().splitlines() if line.startswith(("loss", "val"))]
    return told, saved(folder / "model.pt")


def saved(path: Path) -> str:
    """A hash of all tensors in a file of ``fabric.save``."""
    found = hashlib.sha256()
    for _, state in sorted(torch.load(path, weights_only=True).items()):
        for name, value in state.items():
            found.update(name.encode() + value.numpy().tobytes())
    return found.hexdigest()


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("name", list(CHANGES))
def test_a_script_with_five_lines_changed_goes_on_to_the_bit(
    name: str, size: int, tmp_path: Path
) -> None:
    places = [tmp_path / word for word in ("before", "after", "killed")]
    for place in places:
        place.mkdir()
    before = run_ranks(size, script, (SCRIPTS / f"{name}.py").read_text(), places[0])
    source = changed(name)
    assert run_ranks(size, script, source, places[1]) == before
    kill_at = 4 if name == "accumulate" else 11
    with pytest.raises(RankError, match="died with exit code -9"):
        run_ranks(size, script, source, places[2], kill_at)
    (lines, weights), *_ = run_ranks(size, script, source, places[2])
    (expected, expected_weights), *_ = before
    assert 0 < len(lines) < len(expected)
    assert lines == expected[-len(lines) :]
    assert weights == expected_weights
