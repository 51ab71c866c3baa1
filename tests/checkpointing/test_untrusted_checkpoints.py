"""Somebody else's checkpoint runs no code, whichever of its files a payload hides in."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dream_trainer.checkpointing import Checkpointer, export_checkpoint
from dream_trainer.configs import CheckpointParameters
from dream_trainer.errors import CheckpointError
from dream_trainer.storage import Manifest
from dream_trainer.storage.manifest import checksums

FILES = (".metadata", "__0_0.distcp", "manifest.json")


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.path,)


def pickled(payload: Payload) -> bytes:
    return pickle.dumps(payload)


def in_a_tensor_file(payload: Payload) -> bytes:
    buffer = io.BytesIO()
    torch.save(payload, buffer)
    return buffer.getvalue()


def in_a_dictionary(payload: Payload) -> bytes:
    return pickle.dumps({"format_version": 1, "files": payload, "step": payload})


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("form", [pickled, in_a_tensor_file, in_a_dictionary])
def test_a_payload_is_refused_and_does_not_run(
    tmp_path: Path, name: str, form: Callable[[Payload], bytes]
) -> None:
    checkpointer = Checkpointer(tmp_path / "c", parameters=CheckpointParameters(async_save=False))
    path = checkpointer.save({"models": {"net": {"w": torch.ones(9_000)}}}, step=1)
    content = form(Payload(tmp_path / "ran"))
    (path / name).write_bytes(content)
    if name != "manifest.json":
        # Who plants a payload makes the checksums fit.
        facts = json.loads((path / "manifest.json").read_text())
        del facts["checksum"]
        facts["files"] = checksums({path / one: None for one in FILES[:2]})
        Manifest(**facts).write(path)
        Manifest.read(path).verify(path)
    attempts: dict[str, Callable[[], object]] = {
        "load": lambda: checkpointer.load(path),
        "resume": lambda: checkpointer.resume("must"),
        "export": lambda: export_checkpoint(path, tmp_path / "out.pt"),
    }
    for attempt in attempts.values():
        with pytest.raises(CheckpointError):
            attempt()
    assert not (tmp_path / "ran").exists()
    if form is pickled:
        pickle.loads(content)
        assert (tmp_path / "ran").exists(), "the payload would have run"
