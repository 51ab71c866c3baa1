"""``find-lr``: a learning-rate range test, from the command line."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dream_trainer.cli.messages import launched_rank
from dream_trainer.errors import ConfigError

if TYPE_CHECKING:
    from dream_trainer.cli.dream_cli import DreamCLI

FIND_LR_HELP = "train a few steps with a growing learning rate and suggest one; writes no run"


def add_find_lr_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that are no part of a configuration."""
    parser.add_argument(
        "--min_lr", "--min-lr", type=float, default=1e-7, metavar="X", help="first (default: 1e-7)"
    )
    parser.add_argument(
        "--max_lr", "--max-lr", type=float, default=1.0, metavar="X", help="last (default: 1)"
    )
    parser.add_argument(
        "--steps", type=int, default=100, metavar="N", help="optimizer steps (default: 100)"
    )
    parser.add_argument(
        "--mode",
        choices=("exponential", "linear"),
        default="exponential",
        help="how the rate grows (default: exponential)",
    )
    parser.add_argument("--optimizer", metavar="NAME", help="the only one whose rate grows")
    parser.add_argument(
        "--loss",
        metavar="NAME",
        default="loss",
        help="value of a step to look at (default: loss)",
    )
    add_field_and_output(parser, "the learning rate, to print how it is set", None)


def add_field_and_output(parser: argparse.ArgumentParser, what: str, default: str | None) -> None:
    """Add the two options that both finders have."""
    shown = f" (default: {default})" if default else ""
    parser.add_argument(
        "--field",
        metavar="NAME",
        default=default,
        help=f"dotted name of the option that is {what}{shown}",
    )
    parser.add_argument(
        "--output", metavar="FILE", help="draw the result there, a .png for example"
    )


def check_output(given: argparse.Namespace) -> None:
    """Refuse a drawing that could not be made, before anything is tried.

    Raises:
        ConfigError: it is there already, or matplotlib is not installed.
    """
    if given.output is None:
        return
    # Here, because `--help` needs none of it.
    from dream_trainer.tuning.pictures import require_matplotlib

    if Path(given.output).exists():
        raise ConfigError(
            given.output, ["is there already"], "Choose another --output, or move it."
        )
    require_matplotlib()


def find_lr(cli: DreamCLI) -> Any:
    """Try, print what was found and how to set it.

    Raises:
        ConfigError: as `find_learning_rate`.
    """
    from dream_trainer.tuning import find_learning_rate
    from dream_trainer.tuning.config_field import field_value

    given = cli.own
    if given.field is not None:
        field_value(cli.config, given.field)  # misspelled, it is better known now
    # What a trainer prints would come between the numbers.
    with contextlib.redirect_stdout(sys.stderr):
        result = find_learning_rate(
            cli.trainer_class,
            cli.config,
            min_lr=given.min_lr,
            max_lr=given.max_lr,
            steps=given.steps,
            mode=given.mode,
            optimizer=given.optimizer,
            loss=given.loss,
        )
    if launched_rank() != 0:
        return result
    print(result)
    if result.suggestion is not None:
        if given.field is None:
            print("--field NAME, the option that is the learning rate, shows how to set it")
        else:
            print(f"set it with --{given.field} {result.suggestion:.2g}")
    write_picture(result, given.output)
    return result


def write_picture(result: Any, output: str | None) -> None:
    """Draw a result, if that was asked for."""
    if output is not None:
        result.save(output)
        print(output)
