from __future__ import annotations

from pathlib import Path

import pytest

from dream_trainer.storage import atomic_file, write_text


def test_the_new_content_appears_only_when_the_block_is_over(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "f.txt"
    with atomic_file(path) as beside:
        beside.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    assert [one.name for one in path.parent.iterdir()] == ["f.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_keeps_the_old_file_and_leaves_nothing_beside_it(
    tmp_path: Path, error: type[BaseException]
) -> None:
    path = tmp_path / "f.txt"
    write_text(path, "old")

    def fail() -> None:
        with atomic_file(path) as beside:
            beside.write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert path.read_text() == "old"
    assert [one.name for one in tmp_path.iterdir()] == ["f.txt"]


def test_a_block_that_writes_nothing_is_an_error_and_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "f.txt"
    write_text(path, "old")
    with pytest.raises(FileNotFoundError), atomic_file(path):
        pass
    assert path.read_text() == "old"


def test_text_is_utf_8(tmp_path: Path) -> None:
    write_text(tmp_path / "f", "Füße")
    assert (tmp_path / "f").read_bytes() == "Füße".encode()
