"""Copies of a state in buffers that are reused, to be written while the training goes on."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

#: Source and copy of the local part, and the tensor that the source is a part of.
Parts = list[tuple[Tensor, Tensor, Tensor]]

_SAMPLES = 4096


class StagingBuffers:
    """CPU memory for one copy of a state; pinned for what comes from a CUDA device.

    The first `stage` allocates it, later ones copy into it. A copy must have been written before
    the next one is made.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def stage(self, entries: Mapping[str, Tensor], stable: Collection[int] = ()) -> StagedState:
        """Begin to copy a flat state.

        Args:
            entries: name -> tensor, sharded or not. Sharded ones are copied shard by shard.
            stable: addresses (`address`) of tensors that stay as they are until
                `StagedState.release` is called; the others are copied before this returns.
        """
        copies: dict[str, Tensor] = {}
        now: Parts = []
        later: Parts = []
        for name, entry in entries.items():
            source = local_part(entry)
            buffer = self._buffer(name, source)
            copies[name] = _like(entry, buffer)
            is_stable = source.device.type in ("cpu", "cuda") and address(source) in stable
            (later if is_stable else now).append((source, buffer, entry))
        self._buffers = {name: self._buffers[name] for name in entries}
        for source, buffer, _ in now:
            # On CUDA in stream order: later kernels wait for the copy, the host does not.
            buffer.copy_(source, non_blocking=source.is_cuda)
        return StagedState(copies, later, {source.device for source, _, _ in now + later})

    def _buffer(self, name: str, source: Tensor) -> Tensor:
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != source.shape or buffer.dtype != source.dtype:
            buffer = torch.empty_like(source, device="cpu", pin_memory=source.is_cuda)
            self._buffers[name] = buffer
        return buffer


class StagedState:
    """One copy of a state, under way or complete.

    Two sides use it: the training calls `release` before it changes a stable tensor, the writer
    calls `wait` before it reads ``entries``.

    Attributes:
        entries: name -> copy.
        is_torn: whether `wait` found that a stable tensor was changed.
    """

    def __init__(self, entries: dict[str, Tensor], later: Parts, devices: Iterable[Any]) -> None:
        self.entries = entries
        self._later = later
        self.is_torn = False
        self._versions = self._current_versions()
        self._samples = [_sample(source) for source, _, _ in later]
        self._versions_at_release: list[tuple[int, int]] | None = None
        self._host_copied = threading.Event()
        self._events = [self._copy_on_device(device) for device in devices if device.type == "cuda"]

    def copy(self) -> None:
        """Copy what the host copies. The writer calls it first."""
        try:
            for source, buffer, _ in self._later:
                if not source.is_cuda:
                    buffer.copy_(source)
        finally:
            self._host_copied.set()  # also after an error, or the training would wait for ever

    def release(self) -> None:
        """Return once stable tensors may change. Costs nothing when the copy is complete."""
        if self._versions_at_release is not None:
            return
        self._host_copied.wait()
        for event in self._events:
            event.wait()  # on the device: the stream waits, the host goes on
        self._versions_at_release = self._current_versions()

    def wait(self) -> None:
        """Return once ``entries`` are complete.

        Raises:
            RuntimeError: a stable tensor was changed while it was copied.
        """
        self._host_copied.wait()
        for event in self._events:
            event.synchronize()
        versions = self._current_versions()
        # What changed after the release, changed with permission.
        versions = versions if self._versions_at_release is None else self._versions_at_release
        # What writes through ``.data`` is counted nowhere; it shows in the values.
        self.is_torn = versions != self._versions or any(
            not _same_bytes(_sample(buffer), sample.cpu())
            for (_, buffer, _), sample in zip(self._later, self._samples, strict=True)
        )
        if self.is_torn:
            raise RuntimeError(
                "a parameter or optimizer state was changed in place, by something else than an "
                "optimizer's step, while it was being copied"
            )

    def _current_versions(self) -> list[tuple[int, int]]:
        # A change of a sharded tensor counts on itself, one of its shard on the shard.
        return [(source._version, entry._version) for source, _, entry in self._later]

    def _copy_on_device(self, device: torch.device) -> torch.cuda.Event:
        """Copy in a stream of its own, beside the next forward and backward."""
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for source, buffer, _ in self._later:
                if source.device == device:
                    buffer.copy_(source, non_blocking=True)
            event = torch.cuda.Event()
            event.record(stream)
            return event


def _sample(tensor: Tensor) -> Tensor:
    """Elements from all over a tensor, all of a small one."""
    flat = tensor.reshape(-1) if tensor.is_contiguous() else tensor.flatten()
    return flat[:: max(1, flat.numel() // _SAMPLES)].clone()


def _same_bytes(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))  # NaN is equal to itself


def address(tensor: Tensor) -> int:
    """What tells whether two tensors share memory: where the local part of one begins."""
    return local_part(tensor).data_ptr()


def local_part(tensor: Tensor) -> Tensor:
    """This rank's shard of a sharded tensor, any other as it is; detached."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def _like(entry: Tensor, local: Tensor) -> Tensor:
    if not isinstance(entry, DTensor):
        return local
    # Not from_local, which would move the copy to the mesh's device.
    return DTensor(local, entry._spec, requires_grad=False)
