"""A part of a saved tensor is read without the rest."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator

import pytest
import torch

from dream_trainer.storage.slices import read_slice


class Counting(io.BytesIO):
    """Counts the bytes that were read."""

    num_read = 0

    def read(self, size: int | None = -1, /) -> bytes:
        content = super().read(size)
        self.num_read += len(content)
        return content


def saved(tensor: torch.Tensor) -> Counting:
    file = Counting()
    torch.save(tensor, file)
    file.seek(0)
    return file


def slices(shape: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    ranges = [[slice(a, b) for a, b in itertools.combinations(range(n + 1), 2)][::2] for n in shape]
    yield from itertools.product(*ranges)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(7,), (5, 3), (3, 2, 4)])
@pytest.mark.parametrize("buffer", [1, 40, 1 << 20])
def test_any_part_of_a_tensor_is_the_part(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, shape: tuple[int, ...], buffer: int
) -> None:
    monkeypatch.setattr("dream_trainer.storage.slices._BUFFER_BYTES", buffer)
    whole = torch.arange(torch.Size(shape).numel()).view(shape).to(dtype)
    file = saved(whole)
    for part in slices(shape):
        target = torch.zeros_like(whole[part])
        file.seek(0)
        assert read_slice(file, [one.start for one in part], target)
        assert torch.equal(target, whole[part])


def test_the_other_rows_are_not_read() -> None:
    whole = torch.arange(1 << 18).view(1024, 256)
    file = saved(whole)
    target = torch.zeros(10, 256, dtype=torch.int64)
    assert read_slice(file, [500, 0], target)
    assert torch.equal(target, whole[500:510])
    assert file.num_read < 0.05 * whole.nbytes


@pytest.mark.parametrize(
    "tensor", [torch.arange(12.0).view(3, 4).t(), torch.arange(12.0)[2:8], torch.tensor(1.0)]
)
def test_what_is_laid_out_otherwise_is_left_to_torch(tensor: torch.Tensor) -> None:
    target = torch.full_like(tensor, -1.0)
    assert not read_slice(saved(tensor), [0] * tensor.ndim, target)
    assert bool((target == -1).all())


def test_a_torch_that_cannot_skip_data_reads_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> None:
        raise RuntimeError("`torch.load` called within a torch.serialization.skip_data ...")

    monkeypatch.setattr(torch, "load", load)
    assert not read_slice(io.BytesIO(), [0], torch.empty(1))
