"""``plan``: the subcommand that makes a trainer for ranks that are not here."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from typing import TYPE_CHECKING

from dream_trainer.cli.tables import until_nobody_reads
from dream_trainer.errors import ConfigError

if TYPE_CHECKING:
    from dream_trainer.cli.dream_cli import DreamCLI
    from dream_trainer.planning import RunPlan

PLAN_HELP = "tell what the configuration means on any number of ranks; starts and writes nothing"
#: Columns where nobody sees a terminal, in a file or a pipe.
_PLAIN_WIDTH = 100


def add_plan_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that are no part of a configuration."""
    parser.add_argument("--ranks", type=int, metavar="N", help="processes of the run, one a device")
    parser.add_argument(
        "--ranks_per_node",
        "--ranks-per-node",
        type=int,
        metavar="N",
        default=8,
        help="of them on one machine (default: 8)",
    )
    parser.add_argument("--json", action="store_true", help="numbers for programs, in bytes")


def require_ranks(given: argparse.Namespace) -> None:
    """Raise if it is not said for how many ranks."""
    if given.ranks is None:
        raise ConfigError("--ranks", ["has no value and no default"], "Say how many: --ranks 4096.")


def plan(cli: DreamCLI) -> RunPlan:
    """Plan, and print the plan.

    Raises:
        ConfigError: as `plan_run`.
    """
    given = cli.own
    # Here, because `--help` must wait for none of them.
    from rich.console import Console

    from dream_trainer.planning import plan_run
    from dream_trainer.planning.table import as_text, print_plan

    # What a trainer prints while it is made would come between the numbers.
    with contextlib.redirect_stdout(sys.stderr):
        made = plan_run(
            cli.trainer_class, cli.config, given.ranks, ranks_per_node=given.ranks_per_node
        )
    with until_nobody_reads():
        if given.json:
            print(json.dumps(made.as_dict(), indent=2))
        elif sys.stdout.isatty():
            print_plan(made, Console())
        else:
            print(as_text(made, _PLAIN_WIDTH))
    return made
