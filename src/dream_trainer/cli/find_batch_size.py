"""``find-batch-size``: the largest batch that fits, from the command line."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

from dream_trainer.cli.find_lr import add_field_and_output, write_picture
from dream_trainer.cli.messages import launched_rank

if TYPE_CHECKING:
    from dream_trainer.cli.dream_cli import DreamCLI

FIND_BATCH_SIZE_HELP = "try larger and larger batches; tell which fit and how fast they are"


def add_find_batch_size_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that are no part of a configuration."""
    parser.add_argument(
        "--mode",
        choices=("binsearch", "power"),
        default="binsearch",
        help="search between powers of two as well, or not (default: binsearch)",
    )
    parser.add_argument(
        "--start", type=int, metavar="N", help="first size (default: that of the configuration)"
    )
    parser.add_argument("--max_size", "--max-size", type=int, metavar="N", help="none is larger")
    parser.add_argument(
        "--steps", type=int, default=4, metavar="N", help="optimizer steps of a trial (default: 4)"
    )
    parser.add_argument(
        "--start_method", choices=("fork", "spawn"), help="how the processes of the trials start"
    )
    add_field_and_output(parser, "the batch size of one rank", "batch_size")


def run_find_batch_size(cli: DreamCLI) -> Any:
    """Try, print a table and how to set the sizes.

    Raises:
        ConfigError: as `find_batch_size`.
    """
    # Here, because `--help` needs none of it.
    from dream_trainer.tuning import find_batch_size

    given = cli.own
    result = find_batch_size(
        cli.trainer_class,
        cli.config,
        field=given.field,
        mode=given.mode,
        start=given.start,
        max_size=given.max_size,
        steps=given.steps,
        tell=partial(print, file=sys.stderr),
        start_method=given.start_method,
    )
    if launched_rank() == 0:
        print(result)
        print(f"set it with --{result.field} {result.largest}", end="")
        print("" if result.efficient == result.largest else f", or {result.efficient}")
        write_picture(result, given.output)
    return result
