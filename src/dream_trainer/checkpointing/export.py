"""A checkpoint as one file, for programs that know nothing of this package."""

from __future__ import annotations

import functools
import operator
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dream_trainer.checkpointing.checkpointer import join_local
from dream_trainer.checkpointing.lookup import whole_checkpoint
from dream_trainer.checkpointing.store import StoredCheckpoint
from dream_trainer.checkpointing.weight_names import averaged_places, state_dicts
from dream_trainer.checkpointing.weights import import_safetensors
from dream_trainer.errors import CheckpointError, ConfigError
from dream_trainer.storage import (
    Manifest,
    TreePath,
    atomic_file,
    read_outline,
    read_parts,
    read_tree,
)

_TORCH = (".pt", ".pth")
_LIGHTNING = ".ckpt"
_SAFETENSORS = ".safetensors"

StateDicts = dict[str, dict[str, Any]]


def export_checkpoint(
    checkpoint: str | Path,
    file: str | Path,
    *,
    model: str | None = None,
    weights: str | None = None,
    whole_state: bool = False,
    overwrite: bool = False,
) -> Path:
    """Write the weights of a checkpoint to one file.

    Works on one process without accelerators and without the model's class, whatever strategy
    and number of ranks wrote the checkpoint. It is verified first, only the weights are read,
    and the file appears whole or not at all.

    With one model the file is its state dict: ``net.load_state_dict(torch.load(file))`` loads a
    ``.pt``, and the same with ``safetensors.torch.load_file`` a ``.safetensors``. With several,
    a ``.pt`` is a mapping from model to state dict, and a ``.safetensors`` has names that begin
    with the model's. A ``.ckpt`` is for ``MyModule.load_from_checkpoint(file)`` of a
    LightningModule: its weights, and its hyperparameters if it was trained here.

    Args:
        checkpoint: a checkpoint's directory, or that of a run, for its newest whole one.
        file: ends in ``.safetensors``, ``.pt``, ``.pth`` or ``.ckpt``.
        model: the one model to export, if there are several.
        weights: name of the callback whose averages are written where it has some, ``"ema"`` for
            example; in the types of the models' own weights.
        whole_state: export everything a run resumes from, as nested plain data and tensors;
            what differs between ranks is rank 0's. ``.pt`` and ``.pth`` only.
        overwrite: replace ``file`` if it exists.

    Returns:
        The path of the file. Either kind can be given to ``init_from``.

    Raises:
        CheckpointError: there is no whole checkpoint, or it holds no weights.
        ConfigError: the arguments do not fit each other or the checkpoint, ``file`` exists or
            cannot be written, or safetensors is not installed.
    """
    target = Path(file)
    if problems := _problems(target, model or weights, whole_state, overwrite):
        raise ConfigError(str(target), problems)
    if target.suffix == _SAFETENSORS:
        import_safetensors(target)  # before the work
    stored = whole_checkpoint(Path(checkpoint))
    content: Any
    if whole_state:
        content = join_local(*read_tree(stored.path))
    else:
        found = _read_models(stored, model, weights)
        (content,) = found.values() if len(found) == 1 else (found,)
        if target.suffix == _LIGHTNING:
            content = _as_lightning_has_it(content, stored)
    if target.suffix == _SAFETENSORS:
        write_weights(target, found, _facts(stored.manifest, weights))
    else:
        _save(target, content)
    return target


def write_weights(target: Path, models: StateDicts, facts: Mapping[str, str]) -> None:
    """Write state dicts in one of the forms of `export_checkpoint`.

    Args:
        target: ends in ``.safetensors``, ``.pt`` or ``.pth``.
        models: state dict by name of the model.
        facts: what a ``.safetensors`` says about itself.

    Raises:
        ConfigError: it cannot be written.
    """
    if target.suffix != _SAFETENSORS:
        (content,) = models.values() if len(models) == 1 else (models,)
        _save(target, content)
        return
    try:
        with atomic_file(target) as beside:
            _save_safetensors(beside, target, models, facts)
    except OSError as error:
        raise ConfigError(str(target), [f"cannot be written: {error}"]) from error


def _save(target: Path, content: Any) -> None:
    try:
        # Given a path, torch would put the passing name of the file into it.
        with atomic_file(target) as beside, beside.open("wb") as opened:
            torch.save(content, opened)
    except OSError as error:
        raise ConfigError(str(target), [f"cannot be written: {error}"]) from error


def _problems(target: Path, chosen: str | None, whole_state: bool, overwrite: bool) -> list[str]:
    problems = []
    if target.suffix not in (_SAFETENSORS, _LIGHTNING, *_TORCH):
        problems.append(f"ends in {target.suffix!r}, not in .safetensors, .pt, .pth or .ckpt")
    if whole_state and target.suffix == _LIGHTNING:
        problems.append("whole_state: Lightning resumes from its own checkpoints; choose .pt")
    if whole_state and target.suffix == _SAFETENSORS:
        problems.append("whole_state: a .safetensors file holds tensors alone; choose .pt")
    if whole_state and chosen is not None:
        problems.append("whole_state: it is that of all models; leave out model and weights")
    if target.is_dir() or (target.exists() and not overwrite):
        problems.append(
            "is there already; choose another name, or overwrite it (overwrite=True, --overwrite)"
        )
    return problems


def _read_models(stored: StoredCheckpoint, model: str | None, weights: str | None) -> StateDicts:
    """State dicts by model; no other tensor of the checkpoint is read."""
    outline = read_outline(stored.path)
    places = {".".join(one.folder): one.places for one in state_dicts(outline) if not one.loose}
    if not places:
        raise CheckpointError(str(stored.path), ["it holds no weights"])
    if model is not None and model not in places:
        raise ConfigError(
            str(stored.path),
            [f"it has no model {model!r}"],
            f"There is: {', '.join(name or 'one without a name' for name in places)}.",
        )
    chosen = places if model is None else {model: places[model]}
    averages: Mapping[TreePath, TreePath] = {}
    if weights is not None:
        averages = averaged_places(outline, weights, str(stored.path))
        if not any(place in averages for own in chosen.values() for place in own.values()):
            raise ConfigError(str(stored.path), [f"{weights} has no averages of {model}"])
    wanted = {averages.get(place, place) for own in chosen.values() for place in own.values()}
    parts = read_parts(stored.path, wanted)

    def value(place: TreePath) -> Any:
        if place not in averages:
            return parts[place]
        own = functools.reduce(operator.getitem, place, outline)
        return parts[averages[place]].to(own.dtype)

    return {name: {key: value(place) for key, place in own.items()} for name, own in chosen.items()}


def _as_lightning_has_it(state: Mapping[str, Any], stored: StoredCheckpoint) -> dict[str, Any]:
    outline = read_outline(stored.path)
    own = outline["callbacks"].get("lightning_module", {}) if "callbacks" in outline else {}
    manifest = stored.manifest
    return {
        "state_dict": dict(state),
        "epoch": manifest.epoch,
        "global_step": manifest.step,
        # Its loader asks from which version on it must bring a checkpoint up to date.
        "pytorch-lightning_version": manifest.versions.get("lightning", "2.6.4"),
        "hyper_parameters": dict(own.get("hyper_parameters", {})),
        "hparams_name": own.get("hparams_name"),
    }


def _save_safetensors(
    beside: Path, target: Path, models: StateDicts, facts: Mapping[str, str]
) -> None:
    values = {
        f"{model}.{name}" if len(models) > 1 else name: value
        for model, state in models.items()
        for name, value in state.items()
    }
    left_out = [name for name, value in values.items() if not isinstance(value, Tensor)]
    if left_out:
        warnings.warn(
            f"{target} holds tensors alone, and these are none: {', '.join(left_out)}. "
            "A .pt file has them.",
            stacklevel=3,
        )
    beside.touch()
    mode = beside.stat().st_mode
    tensors = {name: value for name, value in values.items() if name not in left_out}
    metadata = {
        "format": "pt",  # Hugging Face's loader insists on it
        "models": ",".join(models),
        **facts,
    }
    import_safetensors(target).save_file(tensors, beside, metadata=metadata)
    # safetensors makes files that only their owner can read, whatever the umask says.
    beside.chmod(mode)


def _facts(manifest: Manifest, weights: str | None) -> dict[str, str]:
    """What the file says about itself; safetensors knows words only."""
    return {
        "step": str(manifest.step),
        "epoch": str(manifest.epoch),
        "saved_at": manifest.saved_at,
        **({} if weights is None else {"weights": weights}),
        **manifest.versions,
    }
