"""From what a user asks for to one whole checkpoint. Call it on rank 0 only."""

from __future__ import annotations

import warnings
from pathlib import Path

from dream_trainer.checkpointing.store import CheckpointStore, StoredCheckpoint
from dream_trainer.configs import CheckpointParameters
from dream_trainer.errors import CheckpointError, ConfigError
from dream_trainer.storage import Manifest

Damaged = list[tuple[Path, CheckpointError]]
_WORDS = ("auto", "must", "never")


def verified(path: Path) -> StoredCheckpoint:
    """A checkpoint whose files are those of its manifest.

    Raises:
        CheckpointError: it is damaged, or none.
    """
    manifest = Manifest.read(path)
    manifest.verify(path)
    return StoredCheckpoint(path, manifest)


def whole_checkpoint(place: Path) -> StoredCheckpoint:
    """The checkpoint at ``place``, or the newest whole one of the run there.

    Reads only: nothing is renamed, for the run may be under way in another process.

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
        return verified(place)
    return newest_whole(place, paths)


def newest_whole(place: Path, paths: list[Path]) -> StoredCheckpoint:
    """The newest of some checkpoints that is whole; those passed over are warned of.

    Args:
        place: where they are, for messages.
        paths: oldest first; at least one.

    Raises:
        CheckpointError: none is whole.
    """
    stored, damaged = _newest_whole(paths)
    if stored is None:
        raise CheckpointError(str(place), _problems(damaged), "None of its checkpoints is whole.")
    for _, reason in damaged:
        warnings.warn(f"{reason}\nTaking {stored.path.name} instead.", stacklevel=2)
    return stored


def checkpoint_to_resume(
    store: CheckpointStore, parameters: CheckpointParameters, resume: str, *, read_only: bool
) -> StoredCheckpoint | None:
    """What a run continues from; see `Checkpointer.resume`."""
    if not read_only:
        store.clean()
    if resume not in _WORDS:
        return _asked_for(store, resume, read_only)
    paths = store.paths()
    if resume == "never":
        if paths:
            raise ConfigError(
                "checkpoint_parameters",
                [f"resume='never', but {store.directory} has {len(paths)} checkpoints"],
                "Choose another experiment name, or resume='auto' to continue this one.",
            )
        return None
    stored, damaged = _newest_whole(paths)
    if stored is not None:
        _pass_over(store, damaged, read_only)
        if not read_only:
            store.link(parameters)  # a killed save may have got no further than its commit
    elif damaged:
        raise CheckpointError(
            str(store.directory),
            _problems(damaged),
            "No whole checkpoint is left. Move the directory away to start afresh.",
        )
    elif resume == "must":
        raise ConfigError(
            "checkpoint_parameters",
            [f"resume='must', but there is no checkpoint in {store.directory}"],
            "Check project, group and experiment, or use resume='auto'.",
        )
    return stored


def _asked_for(store: CheckpointStore, resume: str, read_only: bool) -> StoredCheckpoint:
    path = Path(resume)
    if path.name == resume and not path.exists():
        raise ConfigError(
            "checkpoint_parameters",
            [f"resume={resume!r} is neither 'auto', 'never', 'must' nor a checkpoint"],
            "Give the path of a checkpoint, runs/.../checkpoints/step-... .",
        )
    stored = verified(path.resolve())
    if not read_only and (later := store.set_aside_after(stored.path)):
        shown = f"{later[0].name} to {later[-1].name}" if len(later) > 1 else later[0].name
        warnings.warn(f"continuing from {path}: renamed {shown} in {store.directory}", stacklevel=2)
    return stored


def _newest_whole(paths: list[Path]) -> tuple[StoredCheckpoint | None, Damaged]:
    damaged: Damaged = []
    for path in reversed(paths):
        try:
            return verified(path), damaged
        except CheckpointError as error:
            damaged.append((path, error))
    return None, damaged


def _pass_over(store: CheckpointStore, damaged: Damaged, read_only: bool) -> None:
    """Report damaged checkpoints and rename them.

    Only once a whole one is found: with none left, another start must fail again, not start
    afresh.
    """
    for path, reason in damaged:
        # Another process may be using what this one is only allowed to read.
        fate = "is left there" if read_only else f"is now {store.set_aside(path, 'damaged').name}"
        warnings.warn(f"{reason}\nIt {fate}; trying the one before.", stacklevel=2)


def _problems(damaged: Damaged) -> list[str]:
    return [f"{path.name}: {one}" for path, why in damaged for one in why.problems]
