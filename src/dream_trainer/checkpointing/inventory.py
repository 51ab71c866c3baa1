"""A run's checkpoints as people look at them: described and left alone."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dream_trainer.checkpointing.store import CheckpointStore, StoredCheckpoint, best_first
from dream_trainer.configs import CheckpointParameters
from dream_trainer.errors import CheckpointError
from dream_trainer.storage import Manifest

_SET_ASIDE = re.compile(r"(step-.*)\.(damaged|superseded)-\d+")
_RULES = ("monitor", "mode", "keep_top_k", "keep_last", "keep_every_n_steps")
_STEP = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class ListedCheckpoint:
    """A directory named like a checkpoint, whole or not."""

    path: Path
    manifest: Manifest | None
    """None if it cannot be read."""
    problems: Sequence[str] = ()
    """What is wrong, as far as sizes tell; empty if nothing is."""
    kinds: Sequence[str] = ()
    """Why it stays: ``"newest"``, ``"best"``, ``"kept for good"``."""

    @property
    def is_whole(self) -> bool:
        """Whether manifest and sizes are as they should be; checksums were not looked at."""
        return not self.problems

    @property
    def step(self) -> int | None:
        """Optimizer steps; from its name if there is no manifest."""
        if self.manifest is not None:
            return self.manifest.step
        match = _STEP.match(self.path.name)
        return int(match[1]) if match else None

    def as_dict(self) -> dict[str, Any]:
        """Plain data, with names that stay."""
        known = self.manifest
        return {
            "path": str(self.path),
            "step": self.step,
            "epoch": known and known.epoch,
            "saved_at": known and known.saved_at,
            "bytes": known and known.num_bytes,
            "world_size": known and known.world_size,
            "monitor": known and known.monitor,
            "monitored": known and known.monitored,
            "kinds": list(self.kinds),
            "whole": self.is_whole,
            "problems": list(self.problems),
        }


@dataclass(frozen=True)
class RunFolder:
    """A run's directory, or one that holds checkpoints only.

    Args:
        directory: of the run.
        store: its checkpoints.
        only: look at this checkpoint alone.
    """

    directory: Path
    store: CheckpointStore
    only: Path | None = None

    @functools.cached_property
    def config(self) -> dict[str, Any] | None:
        """``config.yaml`` as plain data; None if there is none that can be read."""
        return read_config(self.directory / "config.yaml")

    @functools.cached_property
    def recorded(self) -> CheckpointParameters | None:
        """Rules of retention from ``config.yaml``; None if they are not there."""
        given = (self.config or {}).get("checkpoint_parameters")
        if not isinstance(given, dict):
            return None
        try:
            return CheckpointParameters(**{k: v for k, v in given.items() if k in _RULES})
        except (ValueError, TypeError):
            return None

    def checkpoints(self) -> list[ListedCheckpoint]:
        """Every directory named like a checkpoint, oldest first."""
        looked_at = [inspect(path) for path in self.store.paths()]
        # The run may delete some meanwhile: those are not damaged.
        listed = [one for one in looked_at if one.is_whole or one.path.exists()]
        if self.only is not None and not any(one.path == self.only for one in listed):
            return [inspect(self.only)]
        return [one for one in self._with_kinds(listed) if self.only in (None, one.path)]

    def newest_whole(self) -> ListedCheckpoint:
        """The last one whose manifest and sizes are right.

        Raises:
            CheckpointError: there is none.
        """
        listed = self.checkpoints()
        found = next((one for one in reversed(listed) if one.is_whole), None)
        if found is None:
            problems = [f"{one.path.name}: {why}" for one in listed for why in one.problems]
            raise CheckpointError(str(self.directory), problems or ["it has no checkpoint"])
        return found

    def set_aside(self) -> list[Path]:
        """What was a checkpoint and was renamed, because it was damaged or in the way."""
        if self.only is not None or not self.store.directory.is_dir():
            return []
        return sorted(p for p in self.store.directory.iterdir() if _SET_ASIDE.fullmatch(p.name))

    def _with_kinds(self, listed: Sequence[ListedCheckpoint]) -> list[ListedCheckpoint]:
        rules = self.recorded
        newest = next((one.path for one in reversed(listed) if one.is_whole), None)
        best = self._best(listed, rules)
        every = rules.keep_every_n_steps if rules else None

        def kinds(one: ListedCheckpoint) -> Sequence[str]:
            is_kept = every and one.is_whole and one.step is not None and one.step % every == 0
            reasons = {
                "newest": one.path == newest,
                "best": one.path == best,
                "kept for good": is_kept,
            }
            return tuple(name for name, holds in reasons.items() if holds)

        return [replace(one, kinds=kinds(one)) for one in listed]

    def _best(
        self, listed: Sequence[ListedCheckpoint], rules: CheckpointParameters | None
    ) -> Path | None:
        if rules is None:
            # Without the configuration only the link knows whether smaller is better.
            link = self.store.directory / "best"
            return self.store.directory / link.readlink() if link.is_symlink() else None
        if rules.monitor is None:
            return None
        ranked = best_first(stored(listed), rules.mode, rules.monitor)
        return ranked[0].path if ranked else None


def stored(listed: Sequence[ListedCheckpoint]) -> list[StoredCheckpoint]:
    """Those that are whole."""
    return [
        StoredCheckpoint(one.path, one.manifest)
        for one in listed
        if one.manifest is not None and one.is_whole
    ]


def read_config(path: Path) -> dict[str, Any] | None:
    """A configuration file of a run as plain data; None if it cannot be read."""
    # Here, because not every look at a checkpoint needs YAML.
    import yaml

    from dream_trainer.configs.yaml_text import load_yaml

    try:
        config = load_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return config if isinstance(config, dict) else None


def inspect(path: Path) -> ListedCheckpoint:
    """A checkpoint, judged by its manifest and the sizes of its files."""
    try:
        manifest = Manifest.read(path)
    except CheckpointError as error:
        return ListedCheckpoint(path, None, error.problems)
    return ListedCheckpoint(path, manifest, manifest.problems(path, sizes_only=True))
