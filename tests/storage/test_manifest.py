"""Every file of a checkpoint x every damage is found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dream_trainer.errors import CheckpointError
from dream_trainer.storage import FORMAT_VERSION, Manifest, flatten, save_directory

FILES = (".metadata", "__0_0.distcp", "manifest.json")


def flip(path: Path, position: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "removed": Path.unlink,
    "emptied": lambda path: path.write_bytes(b""),
    "truncated by half": lambda path: path.write_bytes(
        path.read_bytes()[: path.stat().st_size // 2]
    ),
    "truncated by a byte": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer by a byte": lambda path: path.write_bytes(path.read_bytes() + b"\n"),
    "first bit flipped": lambda path: flip(path, 0),
    "middle bit flipped": lambda path: flip(path, path.stat().st_size // 2, 3),
    "last bit flipped": lambda path: flip(path, -1, 7),
    "replaced by a directory": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    state = {"w": torch.arange(64.0), "n": 3}
    entries = flatten(state, {"rng": 1})
    save_directory(tmp_path / "c", entries, step=7, epoch=1, monitor="m", monitored=1e-05)
    return tmp_path / "c"


def check(directory: Path) -> Manifest:
    manifest = Manifest.read(directory)
    manifest.verify(directory)
    return manifest


def test_a_whole_checkpoint_passes_and_its_files_are_all_known(directory: Path) -> None:
    manifest = check(directory)
    assert sorted(path.name for path in directory.iterdir()) == sorted(FILES)
    assert sorted(manifest.files) == sorted(set(FILES) - {"manifest.json"})
    assert (manifest.step, manifest.epoch, manifest.world_size) == (7, 1, 1)
    assert (manifest.monitor, manifest.monitored) == ("m", 1e-05)
    assert (
        manifest.versions["torch"] == torch.__version__.split("+")[0] or manifest.versions["torch"]
    )


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_damage_is_found_and_the_file_is_named(directory: Path, name: str, damage: str) -> None:
    DAMAGES[damage](directory / name)
    with pytest.raises(CheckpointError) as caught:
        check(directory)
    assert str(directory) in str(caught.value)
    assert any(name in problem or "format version" in problem for problem in caught.value.problems)


def test_a_flipped_bit_anywhere_in_the_manifest_is_found(directory: Path) -> None:
    path = directory / "manifest.json"
    whole = path.read_bytes()
    unseen = []
    for position in range(len(whole)):
        for bit in {position % 8, 5}:  # 5 turns a letter's case
            path.write_bytes(whole)
            flip(path, position, bit)
            try:
                Manifest.read(directory)
            except CheckpointError:
                continue
            unseen.append((position, bit, path.read_bytes()[position - 8 : position + 8]))
    assert unseen == []


def test_all_damaged_files_are_named_at_once(directory: Path) -> None:
    (directory / ".metadata").unlink()
    flip(directory / "__0_0.distcp", 100)
    with pytest.raises(CheckpointError) as caught:
        check(directory)
    assert caught.value.problems == (
        ".metadata is missing",
        "__0_0.distcp does not match its checksum",
    )


def test_another_format_version_is_said(directory: Path) -> None:
    path = directory / "manifest.json"
    facts = json.loads(path.read_text()) | {"format_version": FORMAT_VERSION + 1}
    path.write_text(json.dumps(facts))
    with pytest.raises(CheckpointError, match=f"format version {FORMAT_VERSION + 1}, this release"):
        Manifest.read(directory)


@pytest.mark.parametrize("text", ["[]", "null", "3", '"x"', "{}", '{"format_version": 1}'])
def test_json_that_is_no_manifest_is_refused(directory: Path, text: str) -> None:
    (directory / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError):
        Manifest.read(directory)


@pytest.mark.parametrize(
    ("monitored", "value"),
    [
        (None, None),
        (0.0, 0.0),
        (-1.5, -1.5),
        ("nan", None),
        ("inf", float("inf")),
        ("-inf", -float("inf")),
    ],
)
def test_any_monitored_value_survives_the_file(
    tmp_path: Path, monitored: float | str | None, value: float | None
) -> None:
    manifest = Manifest(files={}, step=1, epoch=0, world_size=1, monitor="m", monitored=monitored)
    manifest.write(tmp_path)
    assert Manifest.read(tmp_path) == manifest
    assert Manifest.read(tmp_path).monitored_value == value


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that cannot be read")
def test_a_file_that_the_disk_does_not_give_back_is_damage(tmp_path: Path) -> None:
    (tmp_path / "bad").symlink_to("/proc/self/mem")
    manifest = Manifest(files={"bad": {"bytes": 0, "crc32": 0}}, step=1, epoch=0, world_size=1)
    with pytest.raises(CheckpointError, match="bad cannot be read: Input/output error"):
        manifest.verify(tmp_path)
