"""Which checkpoint ``"best"``, ``"last"`` or a path means. Call it on rank 0 only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dream_trainer.checkpointing.lookup import newest_whole, verified
from dream_trainer.checkpointing.store import CheckpointStore, StoredCheckpoint
from dream_trainer.checkpointing.weights import weights_path
from dream_trainer.configs import CheckpointParameters
from dream_trainer.errors import CheckpointError, ConfigError
from dream_trainer.storage import Manifest

#: ``checkpoints ls`` and the link call the last one the newest.
_LAST = ("last", "newest")


@dataclass(frozen=True)
class ChosenCheckpoint:
    """What to read weights from."""

    given: str
    """How it was asked for."""
    path: Path
    """A checkpoint's directory, or another source of weights."""
    manifest: Manifest | None
    """None if it is another source of weights."""

    def __str__(self) -> str:
        if self.manifest is None:
            return self.given
        is_named = Path(self.given).name == self.path.name
        head = self.given if is_named else f"{self.given}: {self.path.name}"
        value = self.manifest.monitored_value
        return head if value is None else f"{head}, {self.manifest.monitor} {value:.4g}"


def chosen_checkpoint(
    store: CheckpointStore, parameters: CheckpointParameters, given: str | Path
) -> ChosenCheckpoint:
    """The whole checkpoint that a user means.

    Args:
        store: the checkpoints of the run.
        parameters: what the best is judged by.
        given: ``"best"``, ``"last"``, the name of one of the run's checkpoints, or a path in one of
            the forms of ``init_from``.

    Raises:
        CheckpointError: it is damaged.
        ConfigError: there is none of that name.
    """
    words = str(given)
    if words == "best":
        stored = _best(store, parameters)
    elif words in _LAST:
        stored = _last(store)
    elif not Path(words).exists():
        stored = _by_name(store, words)
    else:
        path = weights_path(Path(words))
        manifest = Manifest.read(path) if (path / "manifest.json").exists() else None
        return ChosenCheckpoint(words, path.resolve(), manifest)
    return ChosenCheckpoint(words, stored.path, stored.manifest)


def _best(store: CheckpointStore, parameters: CheckpointParameters) -> StoredCheckpoint:
    monitor = parameters.monitor
    if monitor is None:
        raise ConfigError(
            "checkpoint",
            ["'best' is judged by checkpoint_parameters.monitor, which is None"],
            'Set it to a validation result, "val/loss" for example, or take "last".',
        )
    best = store.best(parameters.mode, monitor)
    link = store.directory / "best"
    linked = store.directory / link.readlink() if link.is_symlink() else None
    try:
        if linked is not None and (best is None or linked != best.path):
            Manifest.read(linked)  # one that cannot be read is not among those that were compared
        if best is not None:
            return verified(best.path)
    except CheckpointError as error:
        raise CheckpointError(
            error.place,
            error.problems,
            'It was the best. Take "last", or another by its path: ' + _there(store),
        ) from error
    raise ConfigError(
        "checkpoint",
        [f"no checkpoint in {store.directory} has a value of {monitor}; {_there(store)}"],
        "A checkpoint has one if its step was validated (checkpoint_parameters.after_validation).",
    )


def _last(store: CheckpointStore) -> StoredCheckpoint:
    paths = store.paths()
    if not paths:
        raise ConfigError(
            "checkpoint",
            [f"there is no checkpoint in {store.directory}"],
            "Check project, group and experiment, or train first.",
        )
    return newest_whole(store.directory, paths)


def _by_name(store: CheckpointStore, name: str) -> StoredCheckpoint:
    if name in [path.name for path in store.paths()]:
        return verified(store.directory / name)
    raise ConfigError(
        "checkpoint",
        [f"{name!r} is neither 'best', 'last' nor a path; {_there(store)}"],
    )


def _there(store: CheckpointStore) -> str:
    names = [path.name for path in store.paths()]
    return f"in {store.directory} is: {', '.join(names) or 'nothing'}"
