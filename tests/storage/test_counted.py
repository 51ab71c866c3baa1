from __future__ import annotations

import random
import threading
import zlib
from pathlib import Path

import pytest

from dream_trainer.storage.counted import CountedFiles


@pytest.mark.parametrize("length", [0, 1, (1 << 20) - 1, 1 << 20, 5_000_000])
def test_the_checksum_of_a_file_is_known_when_it_is_written(tmp_path: Path, length: int) -> None:
    content, files = random.Random(length).randbytes(length), CountedFiles()
    with files.create_stream(tmp_path / "beside", "wb") as stream:
        for start in range(0, length, 100_000):
            stream.write(memoryview(content)[start : start + 100_000])
        assert stream.tell() == length
    files.rename(tmp_path / "beside", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == content
    assert files.crc32 == {tmp_path / "file": zlib.crc32(content)}
    assert not [one for one in threading.enumerate() if one.name == "checksum"]
    with files.create_stream(tmp_path / "file", "rb") as stream:
        assert stream.read() == content


def test_without_a_thread_the_file_is_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(self: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Thread, "start", refused)
    files = CountedFiles()
    with files.create_stream(tmp_path / "file", "wb") as stream:
        stream.write(b"content")
    assert (tmp_path / "file").read_bytes() == b"content"
    assert files.crc32 == {}


def test_a_write_that_fails_leaves_no_thread_and_no_checksum(tmp_path: Path) -> None:
    files = CountedFiles()

    def write() -> None:
        with files.create_stream(tmp_path / "file", "wb") as stream:
            stream.write(b"content")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        write()
    assert files.crc32 == {}
    assert not [one for one in threading.enumerate() if one.name == "checksum"]
