from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
from support import run_ranks

from dream_trainer import DreamWorld
from dream_trainer.configs import DeviceParameters
from dream_trainer.errors import CheckpointError
from dream_trainer.storage import Manifest, flatten, move_aside, read_tree, save_directory

STATE = {"w": torch.arange(4.0)}


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_save_makes_one_directory_under_its_final_name(tmp_path: Path) -> None:
    manifest = save_directory(tmp_path / "a" / "c", flatten(STATE, {}), step=3, epoch=1)
    assert names(tmp_path / "a") == ["c"]
    assert Manifest.read(tmp_path / "a" / "c") == manifest
    shared, _ = read_tree(tmp_path / "a" / "c")
    assert torch.equal(shared["w"], STATE["w"])


def test_an_existing_directory_is_moved_aside_whole(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_directory(tmp_path / "c", flatten({"step": step}, {}), step=step, epoch=0)
    assert names(tmp_path) == ["c", "c.superseded-1", "c.superseded-2"]
    steps = [read_tree(tmp_path / name)[0]["step"] for name in names(tmp_path)]
    assert steps == [3, 1, 2]


@pytest.mark.parametrize(
    ("state", "facts", "says"),
    [
        ({"x": torch.ones(3, device="meta")}, {"step": 1}, "bytes needed, .* free in"),
        (STATE, {"step": object()}, "object"),  # fails after the data are written
    ],
    ids=["not writable", "no manifest"],
)
def test_a_save_that_fails_leaves_nothing_behind_and_the_old_one_alone(
    tmp_path: Path, state: dict, facts: dict, says: str
) -> None:
    save_directory(tmp_path / "c", flatten(STATE, {}), step=1, epoch=0)
    with pytest.raises(CheckpointError, match=says):
        save_directory(tmp_path / "c", flatten(state, {}), epoch=0, **facts)
    assert names(tmp_path) == ["c"]
    Manifest.read(tmp_path / "c").verify(tmp_path / "c")


def test_a_place_that_cannot_be_written_is_a_checkpoint_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="Older checkpoints are untouched"):
        save_directory(tmp_path / "file" / "c", flatten(STATE, {}), step=1, epoch=0)
    assert names(tmp_path) == ["file"]


@pytest.mark.distributed
def test_ranks_that_write_to_different_places_make_no_checkpoint(tmp_path: Path) -> None:
    """As on the local disks of two machines: here, a relative path in two working directories."""

    def rank() -> tuple[str, list[str]]:
        world = DreamWorld(DeviceParameters(accelerator="cpu", devices=2, strategy="ddp"))
        world.launch()
        own = tmp_path / str(world.rank)
        own.mkdir()
        os.chdir(own)
        entries = flatten(STATE, {"own": torch.ones(2)}, rank=world.rank)
        with pytest.raises(CheckpointError) as caught:
            save_directory(Path("c"), entries, world.ranks, step=1, epoch=0)
        return str(caught.value), names(own)

    (told, left), other = run_ranks(2, rank)
    assert other == (told, left)
    assert re.search(r"rank 0 does not find .*: __1_0.distcp is missing", told)
    assert "root_dir" in told
    assert left == []


def test_moving_aside_never_overwrites(tmp_path: Path) -> None:
    for text in ("one", "two"):
        (tmp_path / "f").write_text(text)
        move_aside(tmp_path / "f", "damaged")
    assert names(tmp_path) == ["f.damaged-1", "f.damaged-2"]
    assert (tmp_path / "f.damaged-1").read_text() == "one"
