"""``summarize``: what fit would run, without running it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from dream_trainer.cli.tables import until_nobody_reads
from dream_trainer.errors import ConfigError

if TYPE_CHECKING:
    from dream_trainer.cli.dream_cli import DreamCLI

SUMMARIZE_HELP = "tell what fit would run, with its models and how it would start; runs nothing"


def add_summarize_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that are no part of a configuration."""
    parser.add_argument(
        "--depth",
        type=int,
        metavar="N",
        default=1,
        help="levels of modules below each model (default: 1)",
    )


def summarize(cli: DreamCLI) -> Any:
    """Print what a trainer is about to do.

    Raises:
        ConfigError: it is of a kind that cannot tell.
    """
    method = getattr(cli.trainer, "summary", None)
    if method is None:
        raise ConfigError("summarize", [f"{type(cli.trainer).__name__} has no method summary"])
    what = method(cli.own.depth)
    world = cli.trainer.world
    if world.starts_functions or world.is_global_zero:
        # Here, because `--help` must wait for none of them.
        from dream_trainer.callbacks.overview import print_overview
        from dream_trainer.callbacks.screen import new_console

        with until_nobody_reads():
            print_overview(what, new_console())
    return what
