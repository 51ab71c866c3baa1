"""Where a run is on disk, and the configuration that it records there."""

from __future__ import annotations

import dataclasses
import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from dream_trainer.configs import CheckpointParameters
from dream_trainer.configs.differing import Absent, differing
from dream_trainer.configs.yaml_text import dump_yaml, load_yaml
from dream_trainer.randomness import derive
from dream_trainer.storage import free_name, write_text

_ADJECTIVES = (
    "amber bold brisk calm clear coral crisp dapper eager early fair fleet gentle golden keen "
    "lively lucid mellow merry nimble quiet rapid serene silver steady sunny swift tidy vivid warm"
).split()
_NOUNS = (
    "badger birch brook cedar comet condor delta ember falcon fern finch grove harbor heron iris "
    "lark lynx maple meadow moss otter owl pine plover quartz raven river sparrow thistle wren"
).split()


def fresh_experiment_name(job: str | None, run: int = 0) -> str:
    """A readable name: the same in every restart of a job that has an id, else a new one.

    Args:
        job: its id.
        run: how many runs of this process were named before it.
    """
    number = secrets.randbits(64) if job is None else derive(job, *([run] if run else []))
    adjective = _ADJECTIVES[number % len(_ADJECTIVES)]
    noun = _NOUNS[number // 1000 % len(_NOUNS)]
    return f"{adjective}-{noun}-{number // 10**6 % 10_000:04d}"


def config_yaml(config: Any) -> str:
    """A configuration as YAML, complete and in the order of its fields.

    Objects that are not plain data appear by their class path: such a file is a record, and
    can only be fed back if their arguments are filled in.
    """
    return dump_yaml(_plain(config))


def record_config(directory: Path, text: str) -> list[str]:
    """Write ``config.yaml``; an older one that differs is renamed.

    Returns:
        What differs from the older one, ``name: old -> new`` each.
    """
    path = directory / "config.yaml"
    for leftover in directory.glob(".config.yaml*.tmp"):
        leftover.unlink()  # of a process that was killed here
    old = path.read_text(encoding="utf-8") if path.exists() else None
    if old == text:
        return []
    if old is not None:
        # A copy, not a rename: killed in between, the run would have lost its drawn seed.
        write_text(free_name(path, "superseded"), old)
    write_text(path, text)
    return [] if old is None else _differences(old, text)


def _differences(old: str, new: str) -> list[str]:
    try:
        found = differing([load_yaml(old), load_yaml(new)])
    except yaml.YAMLError:
        return ["the earlier one is no YAML"]
    told = [f"{name}: {_told(one)} -> {_told(other)}" for name, (one, other) in found.items()]
    return told or ["its text"]


def _told(value: Any) -> str:
    return str(value) if isinstance(value, (str, Absent)) else json.dumps(value, default=repr)


def recorded_or_new_seed(directory: Path, parameters: CheckpointParameters) -> int:
    """The seed of the run that ``parameters`` continue, or one drawn afresh.

    Args:
        directory: the run's own; a path in ``parameters.resume`` leads to another.
        parameters: whether and from where the run continues.
    """
    if parameters.resume == "never" or (parameters.resume == "auto" and not parameters.enable):
        return secrets.randbits(32)
    if parameters.resume not in ("auto", "must"):
        directory = Path(parameters.resume).absolute().parents[1]
    try:
        recorded = load_yaml((directory / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        recorded = None
    seed = recorded.get("seed") if isinstance(recorded, dict) else None
    return seed if isinstance(seed, int) else secrets.randbits(32)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Path):
        return str(value)
    return {"class_path": f"{type(value).__module__}.{type(value).__qualname__}"}
