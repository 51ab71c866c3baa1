"""``plan``: the subcommand that makes a trainer for ranks that are not here."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dream_trainer.errors import ConfigError

if TYPE_CHECKING:
    from dream_trainer.planning import RunPlan

PLAN_HELP = "tell what the configuration means on any number of ranks; starts and writes nothing"
#: Columns where nobody sees a terminal, in a file or a pipe.
_PLAIN_WIDTH = 100


def split_plan_options(words: Sequence[str], prog: str) -> tuple[argparse.Namespace, list[str]]:
    """The options of ``plan`` itself, and the words that are left for the configuration.

    ``--help`` among those prints the help of the first part here.

    Raises:
        ConfigError: naming the option.
    """
    parser = argparse.ArgumentParser(
        prog=prog,
        usage=f"{prog} --ranks N [--ranks_per_node N] [--json] [options of the configuration]",
        description=PLAN_HELP,
        add_help=False,
        allow_abbrev=False,
        exit_on_error=False,
    )
    own = parser.add_argument_group("plan")
    own.add_argument("--ranks", type=int, metavar="N", help="processes of the run, one per device")
    own.add_argument(
        "--ranks_per_node",
        "--ranks-per-node",
        type=int,
        metavar="N",
        default=8,
        help="of them on one machine (default: 8)",
    )
    own.add_argument("--json", action="store_true", help="numbers for programs, in bytes")
    try:
        given, rest = parser.parse_known_args(words)
    except argparse.ArgumentError as error:
        raise ConfigError(error.argument_name or "options", [error.message]) from None
    if {"-h", "--help"} & set(rest):
        print(parser.format_help())
    elif given.ranks is None and "--print_config" not in rest:
        raise ConfigError("--ranks", ["has no value and no default"], "Say how many: --ranks 4096.")
    return given, rest


def plan(trainer_class: Any, config: Any, given: argparse.Namespace) -> RunPlan:
    """Plan, and print the plan.

    Raises:
        ConfigError: as `plan_run`.
    """
    # Here, because `--help` must wait for none of them.
    from rich.console import Console

    from dream_trainer.planning import plan_run
    from dream_trainer.planning.table import as_text, print_plan

    # What a trainer prints while it is made would come between the numbers.
    with contextlib.redirect_stdout(sys.stderr):
        made = plan_run(trainer_class, config, given.ranks, ranks_per_node=given.ranks_per_node)
    if given.json:
        print(json.dumps(made.as_dict(), indent=2))
    elif sys.stdout.isatty():
        print_plan(made, Console())
    else:
        print(as_text(made, _PLAIN_WIDTH))
    return made
