"""The subcommands, and the part of a command line that comes before a trainer's own options."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dream_trainer.cli.checkpoints import add_checkpoints_command
from dream_trainer.cli.completion import add_completion_command
from dream_trainer.cli.export import add_export_command
from dream_trainer.cli.export_model import (
    EXPORT_MODEL_HELP,
    add_export_model_options,
    check_export_model,
    export_model,
)
from dream_trainer.cli.find_batch_size import (
    FIND_BATCH_SIZE_HELP,
    add_find_batch_size_options,
    run_find_batch_size,
)
from dream_trainer.cli.find_lr import FIND_LR_HELP, add_find_lr_options, check_output, find_lr
from dream_trainer.cli.inspection import (
    BENCHMARK_HELP,
    GRAPH_BREAKS_HELP,
    PROFILE_HELP,
    add_benchmark_options,
    add_graph_breaks_options,
    add_profile_options,
    run_benchmark,
    run_find_graph_breaks,
    run_profile,
)
from dream_trainer.cli.on_checkpoint import add_checkpoint, call_method
from dream_trainer.cli.plan import PLAN_HELP, add_plan_options, plan, require_ranks
from dream_trainer.cli.predict import add_predict_options, check_predict, predict
from dream_trainer.cli.report import add_report_command
from dream_trainer.cli.verify_resume import (
    VERIFY_RESUME_HELP,
    add_verify_resume_options,
    run_verify_resume,
)
from dream_trainer.errors import ConfigError

if TYPE_CHECKING:
    from dream_trainer.cli.dream_cli import DreamCLI


@dataclass(frozen=True)
class Command:
    """A subcommand that takes a configuration.

    Args:
        help: one line for ``--help``.
        run: what it does, given the `DreamCLI`; the result is kept as ``DreamCLI.result``.
        add_options: adds options of its own to an argparse parser; ``DreamCLI.own`` has their
            values.
        makes_trainer: whether there is a trainer before it runs.
        check: given the values of its own options, raises `ConfigError`.
    """

    help: str
    run: Callable[[DreamCLI], Any]
    add_options: Callable[[argparse.ArgumentParser], object] | None = None
    makes_trainer: bool = True
    check: Callable[[argparse.Namespace], object] | None = None


def _evaluated(name: str) -> Callable[[DreamCLI], Any]:
    """Run a method that evaluates, and print the results."""

    def run(cli: DreamCLI) -> Any:
        results = call_method(cli, name)
        world = cli.trainer.world
        # Where ranks were started elsewhere, and have ended, this process alone is left to speak.
        tell = print if world.starts_functions else world.print
        for result, value in results.items():
            tell(f"{result} {value}")
        return results

    return run


_THEN = ("validate", "test", "predict")


def _add_then(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--then",
        choices=_THEN,
        help="what follows on the same trainer, unless it was interrupted",
    )
    add_checkpoint(parser, "what --then follows on")


def _fit(cli: DreamCLI) -> Any:
    cli.trainer.fit()
    if cli.own.then is None:
        return None
    if getattr(cli.trainer, "is_brought_back", False):
        cli.make_trainer()  # its ranks have ended; a new one starts from what they saved
    cli.own.output = None
    return cli.commands[cli.own.then].run(cli)


def _check_then(own: argparse.Namespace) -> None:
    if getattr(own, "checkpoint", None) is not None and own.then is None:
        raise ConfigError(
            "options",
            ["--checkpoint says what --then follows on, and there is no --then"],
            "To start from weights: --checkpoint_parameters.init_from. To continue from another "
            "checkpoint: --checkpoint_parameters.resume.",
        )


COMMANDS: Mapping[str, Command] = {
    "fit": Command(
        "train; a run that was interrupted goes on where it stopped",
        _fit,
        _add_then,
        check=_check_then,
    ),
    "validate": Command(
        "validate once, on the state that fit would continue from",
        _evaluated("validate"),
        add_checkpoint,
    ),
    "test": Command(
        "run test_step over test_dataloader, on the state that fit would continue from",
        _evaluated("test"),
        add_checkpoint,
    ),
    "predict": Command(
        "run predict_step over predict_dataloader, on the state that fit would continue from",
        predict,
        add_predict_options,
        check=check_predict,
    ),
    "export-model": Command(
        EXPORT_MODEL_HELP, export_model, add_export_model_options, check=check_export_model
    ),
    "verify-resume": Command(
        VERIFY_RESUME_HELP, run_verify_resume, add_verify_resume_options, makes_trainer=False
    ),
    "find-lr": Command(
        FIND_LR_HELP, find_lr, add_find_lr_options, makes_trainer=False, check=check_output
    ),
    "find-batch-size": Command(
        FIND_BATCH_SIZE_HELP,
        run_find_batch_size,
        add_find_batch_size_options,
        makes_trainer=False,
        check=check_output,
    ),
    "benchmark": Command(BENCHMARK_HELP, run_benchmark, add_benchmark_options, makes_trainer=False),
    "profile": Command(PROFILE_HELP, run_profile, add_profile_options, makes_trainer=False),
    "find-graph-breaks": Command(
        GRAPH_BREAKS_HELP, run_find_graph_breaks, add_graph_breaks_options, makes_trainer=False
    ),
    "plan": Command(PLAN_HELP, plan, add_plan_options, makes_trainer=False, check=require_ranks),
}


def command_parser(
    prog: str, target: bool, commands: Mapping[str, Command] = COMMANDS
) -> argparse.ArgumentParser:
    """A parser of the first words of a command line.

    It is plain argparse, so that its ``--help`` loads nothing else.

    Args:
        prog: the program's name.
        target: whether the word after the subcommand names a trainer class.
        commands: those that take a configuration.
    """
    words = "COMMAND MODULE:CLASS" if target else "COMMAND"
    parser = argparse.ArgumentParser(
        prog=prog,
        allow_abbrev=False,
        usage=f"{prog} [--help] {words} [options]",
        epilog=f"'{prog} {words} --help' lists the options of a command.",
    )
    made = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in commands.items():
        one = made.add_parser(
            name,
            prog=f"{prog} {name}",
            help=command.help,
            description=command.help,
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
        add_checkpoints_command(made, prog)
        add_report_command(made, prog)
        add_export_command(made, prog)
        add_completion_command(made, prog)
    return parser


class _OwnOptions(argparse.ArgumentParser):
    """Options of a subcommand. A field of the same name takes the place of one."""

    fields: Collection[str] = ()

    def add_argument(self, *flags: Any, **options: Any) -> Any:
        hidden = [flag for flag in flags if str(flag).removeprefix("--") in self.fields]
        if not hidden:
            return super().add_argument(*flags, **options)
        is_flag = options.get("action") == "store_true"
        self.set_defaults(
            **{hidden[0].removeprefix("--"): options.get("default", False if is_flag else None)}
        )
        return None


def own_options(
    command: Command, prog: str, fields: Collection[str] = ()
) -> argparse.ArgumentParser:
    """A parser of the options that belong to a subcommand itself.

    Args:
        command: the subcommand.
        prog: how it is called.
        fields: of the configuration. One of them takes the place of an option of its name.
    """
    parser = _OwnOptions(
        prog=prog,
        usage=f"{prog} [options] [options of the configuration]",
        description=command.help,
        add_help=False,
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.fields = fields
    parser.add_argument(
        "--preset",
        action="append",
        default=[],
        metavar="NAME",
        help="a function of the trainer's author that changes the configuration: debug (one batch "
        "of everything), overfit, and the trainer's own; may be repeated",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of a mistake")
    if command.add_options is not None:
        command.add_options(parser)
    return parser


def split_own_options(
    command: Command, words: Sequence[str], prog: str, fields: Collection[str]
) -> tuple[argparse.Namespace, list[str]]:
    """The options of a subcommand itself, and the words that are left for the configuration.

    ``--help`` among those prints the help of the first part here.

    Args:
        command: the subcommand.
        words: behind its name.
        prog: how it is called.
        fields: of the configuration.

    Raises:
        ConfigError: naming the option.
    """
    parser = own_options(command, prog, fields)
    try:
        given, rest = parser.parse_known_args(words)
    except argparse.ArgumentError as error:
        raise ConfigError(error.argument_name or "options", [error.message]) from None
    if {"-h", "--help"} & set(rest):
        print(parser.format_help())
    elif command.check is not None and "--print_config" not in rest:
        command.check(given)
    return given, rest
