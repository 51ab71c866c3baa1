"""DreamCLI: a trainer class as a program."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dream_trainer.cli.commands import COMMANDS, command_parser
from dream_trainer.cli.messages import exit_statuses, first_rank_speaks
from dream_trainer.cli.plan import plan, split_plan_options

if TYPE_CHECKING:
    from dream_trainer.trainer import AbstractTrainer


class DreamCLI:
    """Reads a command line, makes the configuration and the trainer, and runs a subcommand.

    The dataclass that annotates ``config`` on the trainer class is the interface: every field
    is an option. In a script:

        if __name__ == "__main__":
            DreamCLI(MyTrainer)

    Args:
        trainer_class: an `AbstractTrainer`.
        args: the words after the program's name; ``sys.argv`` without them.
        run: whether to run the subcommand. If False, it is only parsed and the trainer is made.
        prog: how the program is called in help and messages, ``{}`` for the subcommand.

    Attributes:
        subcommand: the name of the subcommand.
        config: the configuration.
        trainer: the trainer, made from ``config``; None for ``plan``, which makes its own.
        result: what the subcommand returned; None before it has run.

    Raises:
        SystemExit: with status 2 if the configuration cannot work, 1 if a checkpoint cannot be
            used, 130 after Ctrl-C; 0 after ``--help`` and ``--print_config``.
    """

    def __init__(
        self,
        trainer_class: type[AbstractTrainer],
        args: Sequence[str] | None = None,
        run: bool = True,
        *,
        prog: str | None = None,
    ) -> None:
        self.result: Any = None
        words = list(sys.argv[1:] if args is None else args)
        prog = prog or f"{Path(sys.argv[0]).name} {{}}"
        with exit_statuses(prog.partition(" ")[0]):
            self._parse(trainer_class, words, prog)
            if self.subcommand == "plan":
                # For a trainer of this process the devices of the run would have to be here.
                self.trainer = None
                if run:
                    self.result = plan(trainer_class, self.config, self._plan_options)
                return
            self.trainer = trainer_class(self.config)
            if hasattr(self.trainer, "describe_config"):
                self.trainer.describe_config = self._describe
            if run:
                self.result = COMMANDS[self.subcommand].run(self.trainer)

    def _parse(self, trainer_class: type[AbstractTrainer], words: list[str], prog: str) -> None:
        with first_rank_speaks():
            # It looks at the first word alone: the others belong to the subcommand.
            commands = command_parser(prog.partition(" ")[0], target=False)
            self.subcommand: str = commands.parse_args(words[:1]).command
            words = words[1:]
            if self.subcommand == "plan":
                self._plan_options, words = split_plan_options(words, prog.replace("{}", "plan"))
            # Here, because `dream-trainer --help` needs none of it.
            from dream_trainer.cli.config_class import config_class_of
            from dream_trainer.cli.config_parser import ConfigParser

            self._parser = ConfigParser(
                config_class_of(trainer_class), prog.replace("{}", self.subcommand)
            )
            self._namespace = self._parser.parse(words)
        self.config: Any = self._parser.instantiate(self._namespace)

    def _describe(self, config: Any) -> str:
        """``config.yaml`` of a run: what was parsed, with the seed and the name it has got."""
        given = {"seed": config.seed, "experiment": config.experiment}
        return self._parser.dump(self._namespace, given)
