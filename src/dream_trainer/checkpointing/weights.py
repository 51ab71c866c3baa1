"""Weights to start from: our checkpoints, and files of torch, Fabric, Lightning, safetensors."""

from __future__ import annotations

import importlib
import json
import pickle
import re
import zipfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dream_trainer.checkpointing.lookup import whole_checkpoint
from dream_trainer.errors import CheckpointError, ConfigError
from dream_trainer.storage import Like, Tree, TreePath, read_outline, read_parts

_INDEX = "model.safetensors.index.json"
_ONE_FILE = "model.safetensors"


@dataclass(frozen=True)
class WeightsSource:
    """A tree with weights somewhere in it."""

    path: Path
    """What it is read from."""
    tree: Tree
    """Its shape; tensors may be on the meta device, or in a file that is mapped into memory."""
    read: Callable[[Collection[TreePath], Like | None], Mapping[TreePath, Any]]
    """The leaves at some places; no collective."""


def weights_path(given: Path) -> Path:
    """What to open for a path that a user gave. Call it on rank 0 only.

    Of a run it is the newest whole checkpoint; a checkpoint is verified.

    Raises:
        CheckpointError: there is nothing, or it is damaged.
    """
    if not given.exists():
        raise CheckpointError(str(given), ["there is no such file or directory"])
    is_hugging_face = (given / _INDEX).exists() or (given / _ONE_FILE).exists()
    return given if given.is_file() or is_hugging_face else whole_checkpoint(given).path


def open_weights(path: Path) -> WeightsSource:
    """Open what `weights_path` gave. Nothing in it is executed.

    Raises:
        CheckpointError: it cannot be read, or not without running code.
    """
    if path.is_dir() and not (path / _INDEX).exists() and not (path / _ONE_FILE).exists():
        return WeightsSource(
            path, read_outline(path), lambda places, like: read_parts(path, places, like)
        )
    if path.is_dir():
        tree: Tree = _read_folder(path)
    elif path.suffix == ".safetensors":
        tree = _read_safetensors(path)
    else:
        tree = _read_torch(path)
    return WeightsSource(
        path, tree, lambda places, _: {place: _leaf(tree, place) for place in places}
    )


def import_safetensors(path: Path) -> Any:
    """The module ``safetensors.torch``.

    Raises:
        ConfigError: the package is not installed.
    """
    try:
        return importlib.import_module("safetensors.torch")
    except ModuleNotFoundError:
        raise ConfigError(
            str(path),
            ["files of this kind need the package safetensors, which is not installed"],
            "pip install 'dream-trainer[safetensors]'",
        ) from None


def _leaf(tree: Tree, place: TreePath) -> Any:
    for key in place:
        tree = tree[key]
    return tree


def _read_torch(path: Path) -> Tree:
    try:
        # Mapped: a rank touches only the pages of tensors that it copies. Files of the format
        # before torch 1.6 cannot be.
        is_zip = zipfile.is_zipfile(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        raise CheckpointError(
            str(path),
            [
                f"it holds a {found[1]}, which loading would have to unpickle, and a pickle can "
                "run code"
                if found
                else "it is damaged, or holds more than tensors and plain data, which can run code"
            ],
            "It was not loaded. Where you trust it, save its weights alone: "
            "torch.save(model.state_dict(), file).",
        ) from None
    except Exception as error:  # a damaged file fails in many ways
        raise CheckpointError(str(path), [f"{type(error).__name__}: {error}"]) from error


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    module = import_safetensors(path)
    try:
        tensors: dict[str, torch.Tensor] = module.load_file(path)
    except Exception as error:  # SafetensorError, and what the system says
        raise CheckpointError(str(path), [f"{type(error).__name__}: {error}"]) from error
    return tensors


def _read_folder(path: Path) -> dict[str, torch.Tensor]:
    """Shards and their index, as Hugging Face writes them."""
    if not (path / _INDEX).exists():
        return _read_safetensors(path / _ONE_FILE)
    try:
        index = json.loads((path / _INDEX).read_text(encoding="utf-8"))
        shard_of: dict[str, str] = dict(index["weight_map"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            str(path / _INDEX), [f"is no index of shards ({type(error).__name__}: {error})"]
        ) from error
    shards = sorted(set(shard_of.values()))
    if missing := [name for name in shards if not (path / name).is_file()]:
        raise CheckpointError(str(path), [f"{name} is missing" for name in missing])
    tensors = {name: _read_safetensors(path / name) for name in shards}
    absent = [name for name, shard in shard_of.items() if name not in tensors[shard]]
    if absent:
        raise CheckpointError(str(path), [f"{shard_of[one]} has no {one}" for one in absent])
    return {name: tensors[shard][name] for name, shard in shard_of.items()}
