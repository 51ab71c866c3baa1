"""From the path that a user gives to one whole checkpoint."""

from __future__ import annotations

import warnings
from pathlib import Path

from dream_trainer.checkpointing.store import CheckpointStore, StoredCheckpoint
from dream_trainer.errors import CheckpointError
from dream_trainer.storage import Manifest


def whole_checkpoint(place: Path) -> StoredCheckpoint:
    """The checkpoint at ``place``, or the newest whole one of the run there.

    Reads only: nothing is renamed, for the run may be under way in another process. Call it on
    rank 0 only.

    Args:
        place: a checkpoint, a run's directory or its ``checkpoints``.

    Raises:
        CheckpointError: there is none, or none is whole.
    """
    stores = [CheckpointStore(folder) for folder in (place / "checkpoints", place)]
    paths = next((paths for store in stores if (paths := store.paths())), [])
    if not paths and place.is_dir() and not (place / "manifest.json").exists():
        raise CheckpointError(
            str(place),
            ["it has neither a manifest.json nor checkpoints/step-*"],
            "Give a checkpoint's directory, or that of a run which has saved one.",
        )
    if not paths:
        return _verified(place)
    damaged: list[CheckpointError] = []
    for path in reversed(paths):
        try:
            stored = _verified(path)
        except CheckpointError as error:
            damaged.append(error)
            continue
        for reason in damaged:
            warnings.warn(f"{reason}\nTaking {stored.path.name} instead.", stacklevel=2)
        return stored
    problems = [f"{Path(one.place).name}: {why}" for one in damaged for why in one.problems]
    raise CheckpointError(str(place), problems, "None of its checkpoints is whole.")


def _verified(path: Path) -> StoredCheckpoint:
    manifest = Manifest.read(path)
    manifest.verify(path)
    return StoredCheckpoint(path, manifest)
