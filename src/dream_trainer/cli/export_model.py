"""``export-model``: a model as a program, or as weights, from one of a run's checkpoints."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dream_trainer.cli.on_checkpoint import add_checkpoint, call_method
from dream_trainer.errors import ConfigError

if TYPE_CHECKING:
    from dream_trainer.cli.dream_cli import DreamCLI

EXPORT_MODEL_HELP = "write the model as a program that needs none of its code: torch.export, ONNX"


def add_export_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument(
        "--output", metavar="FILE", help="ends in .pt2, .onnx, .safetensors, .pt or .ckpt"
    )
    parser.add_argument("--model", help="the one model to export, if there are several")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE if it exists")
    add_checkpoint(parser)


def check_export_model(own: argparse.Namespace) -> None:
    """Refuse a command without ``--output``.

    Raises:
        ConfigError: there is none.
    """
    if own.output is None:
        raise ConfigError("export-model", ["--output FILE is missing"])


def export_model(cli: DreamCLI) -> Any:
    """Run ``export-model``; gives the path."""
    own = cli.own
    path: Path = call_method(cli, "export", own.output, model=own.model, overwrite=own.overwrite)
    world = cli.trainer.world
    tell = print if world.starts_functions else world.print
    tell(f"{path}: {path.stat().st_size} bytes")
    return path
