"""The subcommands, and the part of a command line that comes before a trainer's own options."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dream_trainer.cli.checkpoints import add_checkpoints_command
from dream_trainer.cli.completion import add_completion_command
from dream_trainer.cli.export import add_export_command
from dream_trainer.cli.plan import PLAN_HELP
from dream_trainer.cli.report import add_report_command
from dream_trainer.errors import ConfigError


@dataclass(frozen=True)
class Command:
    """A subcommand that runs one method of a trainer.

    Args:
        help: one line for ``--help``.
        run: what it does; the result is kept as ``DreamCLI.result``.
    """

    help: str
    run: Callable[[Any], Any]


def _validate(trainer: Any) -> dict[str, float]:
    if not hasattr(trainer, "validate"):
        raise ConfigError("validate", [f"{type(trainer).__name__} has no method of that name"])
    results: dict[str, float] = trainer.validate()
    for name, value in results.items():
        trainer.world.print(f"{name} {value}")
    return results


COMMANDS = {
    "fit": Command(
        "train; a run that was interrupted goes on where it stopped", lambda trainer: trainer.fit()
    ),
    "validate": Command("validate once, on the state that fit would continue from", _validate),
}


def command_parser(prog: str, target: bool) -> argparse.ArgumentParser:
    """A parser of the first words of a command line.

    It is plain argparse, so that its ``--help`` loads nothing else.

    Args:
        prog: the program's name.
        target: whether the word after the subcommand names a trainer class.
    """
    words = "COMMAND MODULE:CLASS" if target else "COMMAND"
    parser = argparse.ArgumentParser(
        prog=prog,
        allow_abbrev=False,
        usage=f"{prog} [--help] {words} [options]",
        epilog=f"'{prog} {words} --help' lists the options of a command.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    helps = {name: command.help for name, command in COMMANDS.items()} | {"plan": PLAN_HELP}
    for name, words_of_help in helps.items():
        one = commands.add_parser(
            name,
            prog=f"{prog} {name}",
            help=words_of_help,
            description=words_of_help,
            allow_abbrev=False,
            usage=f"{prog} {name} {'MODULE:CLASS ' if target else ''}[options]",
        )
        if target:
            one.add_argument(
                "target",
                metavar="MODULE:CLASS",
                help="the trainer: my_package.train:MyTrainer, or path/to/train.py:MyTrainer; "
                "with --help after it, its options are listed",
            )
    if target:
        add_checkpoints_command(commands, prog)
        add_report_command(commands, prog)
        add_export_command(commands, prog)
        add_completion_command(commands, prog)
    return parser
