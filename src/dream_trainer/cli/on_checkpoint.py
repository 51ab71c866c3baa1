"""``--checkpoint``: which weights a command works on."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from dream_trainer.errors import ConfigError

if TYPE_CHECKING:
    from dream_trainer.cli.dream_cli import DreamCLI


def add_checkpoint(parser: argparse.ArgumentParser, what: str = "work on its weights") -> None:
    """Add the option."""
    parser.add_argument(
        "--checkpoint",
        metavar="best|last|PATH",
        help=f"{what}: best by checkpoint_parameters.monitor, the last, the name of one of the "
        "run's checkpoints, or the path of a checkpoint, a run or a file of weights",
    )


def call_method(cli: DreamCLI, name: str, *arguments: Any, **options: Any) -> Any:
    """Call a method of the trainer, with ``checkpoint`` if the option was given.

    Raises:
        ConfigError: the trainer has no such method.
    """
    method = getattr(cli.trainer, name, None)
    if method is None:
        raise ConfigError(name, [f"{type(cli.trainer).__name__} has no method of that name"])
    # A field of the configuration may have its name, and takes its place.
    if (checkpoint := getattr(cli.own, "checkpoint", None)) is not None:
        options["checkpoint"] = checkpoint
    return method(*arguments, **options)
