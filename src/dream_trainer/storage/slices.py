"""Parts of saved tensors, read without the rest."""

from __future__ import annotations

import io
import math
import os
import struct
import zipfile
from collections.abc import Sequence
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.serialization import skip_data

#: Smaller tensors are read whole, which takes fewer reads.
WORTHWHILE_BYTES = 1 << 20
_BUFFER_BYTES = 4 << 20
_LOCAL_HEADER_BYTES = 30


class FileView(io.RawIOBase):
    """A range of bytes of a file, as a file. torch's own cannot be sought from its end."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self._file, self._start, self._length, self._place = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._length}[whence]
        self._place = max(base + offset, 0)
        return self._place

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer)[: max(self._length - self._place, 0)]
        self._file.seek(self._start + self._place)
        num_read = self._file.readinto(view)  # type: ignore[attr-defined]
        self._place += num_read
        return int(num_read)


def read_slice(file: Any, offsets: Sequence[int], target: Tensor) -> bool:
    """Fill a tensor with a part of one that ``torch.save`` wrote.

    ``torch.load`` would read the whole of it, so that each of many ranks reads a whole checkpoint,
    and holds a whole tensor at a time. Here a rank reads the rows that its part is in.

    Args:
        file: what ``torch.save`` wrote, from its beginning; open for reading bytes, seekable.
        offsets: where the part begins, in each dimension.
        target: what to fill; its shape is that of the part.

    Returns:
        False, and nothing is done, if the bytes are not laid out row by row, or if torch is too
        old (2.6) to say so without reading them.
    """
    try:
        with skip_data():  # shape and type, in memory that nobody touches
            saved: Tensor = torch.load(file, map_location="cpu", weights_only=True)
    except RuntimeError:
        return False  # reading the whole says what is wrong, if that is not torch's age
    start = _start_of_data(file, saved)
    if start is None or saved.ndim == 0:
        return False
    row_shape = saved.shape[1:]
    row_bytes = math.prod(row_shape) * saved.element_size()
    rows_at_once = max(1, _BUFFER_BYTES // max(row_bytes, 1))
    for first in range(0, target.shape[0], rows_at_once):
        part = target[first : first + rows_at_once]
        file.seek(start + (offsets[0] + first) * row_bytes)
        content = bytearray(file.read(len(part) * row_bytes))
        rows = torch.frombuffer(content, dtype=saved.dtype).view(len(part), *row_shape)
        for dim in range(1, saved.ndim):
            rows = rows.narrow(dim, offsets[dim], part.shape[dim])
        part.copy_(rows)
    return True


def _start_of_data(file: Any, saved: Tensor) -> int | None:
    """Where the elements begin, if they are in the file one after the other."""
    file.seek(0)
    with zipfile.ZipFile(file) as archive:
        records = [one for one in archive.infolist() if "/data/" in one.filename]
    is_plain = saved.is_contiguous() and saved.storage_offset() == 0
    if not is_plain or len(records) != 1 or records[0].file_size != saved.nbytes:
        return None
    file.seek(records[0].header_offset)
    header = file.read(_LOCAL_HEADER_BYTES)
    name_bytes, extra_bytes = struct.unpack("<HH", header[-4:])
    return records[0].header_offset + _LOCAL_HEADER_BYTES + int(name_bytes) + int(extra_bytes)
