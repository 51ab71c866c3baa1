"""``predict``: with ``--output`` one result in the order of the data, whatever the ranks."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dream_trainer.cli.on_checkpoint import add_checkpoint, call_method
from dream_trainer.errors import ConfigError

if TYPE_CHECKING:
    from dream_trainer.cli.dream_cli import DreamCLI

_FILES = (".pt", ".pth")


def add_predict_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--output`` and ``--checkpoint``."""
    parser.add_argument(
        "--output",
        metavar="FILE.pt|FOLDER",
        help="write the predictions, in the order of the data set: into one file of torch.save, "
        "which they must fit into memory for, or a folder for read_predictions",
    )
    add_checkpoint(parser)


def check_predict(own: argparse.Namespace) -> None:
    """Refuse what is there, before anything is predicted.

    Raises:
        ConfigError: it is.
    """
    if own.output is not None and Path(own.output).exists():
        raise ConfigError(own.output, ["is there already"], "Choose another --output, or move it.")


def predict(cli: DreamCLI) -> Any:
    """Run ``predict``.

    Returns:
        The predictions of this rank; with ``--output``, where they are.
    """
    if cli.own.output is None:
        return call_method(cli, "predict")
    # Here, because `--help` needs none of it.
    from dream_trainer.callbacks import CallbackList, PredictionWriter

    trainer, path = cli.trainer, Path(cli.own.output)
    if not isinstance(getattr(trainer, "callbacks", None), CallbackList):
        raise ConfigError("--output", [f"{type(trainer).__name__} is no BaseTrainer"])
    is_file = path.suffix in _FILES
    folder = path.with_name(f".{path.name}.samples") if is_file else path
    writer = PredictionWriter(folder, overwrite=is_file)
    trainer.callbacks = trainer.callbacks.preceded_by("prediction_writer", writer)
    call_method(cli, "predict", return_predictions=False)
    # Where ranks were started elsewhere, and have ended, this process alone is left.
    if trainer.world.starts_functions or trainer.world.is_global_zero:
        print(f"{path}: {_settle(folder, path)} samples")
    return path


def _settle(folder: Path, path: Path) -> int:
    """Make one file of a folder, if one is wanted; give the number of samples."""
    import torch

    from dream_trainer.predictions import read_predictions
    from dream_trainer.storage import atomic_file

    predictions = read_predictions(folder)
    if path != folder:
        with atomic_file(path) as beside:
            torch.save(predictions.together(), beside)
        shutil.rmtree(folder)
    return len(predictions)
