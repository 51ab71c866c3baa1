"""DreamCLI: a trainer class as a program."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from dream_trainer.cli.commands import COMMANDS, Command, command_parser, split_own_options
from dream_trainer.cli.config_class import config_class_of
from dream_trainer.cli.messages import exit_statuses, first_rank_speaks
from dream_trainer.errors import ConfigError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from dream_trainer.trainer import AbstractTrainer


class DreamCLI:
    """Reads a command line, makes the configuration and the trainer, and runs a subcommand.

    The dataclass that annotates ``config`` on the trainer class is the interface: every field
    is an option. In a script:

        if __name__ == "__main__":
            DreamCLI(MyTrainer)

    A subclass can have more options (`add_arguments`) and more subcommands (``commands``).

    Args:
        trainer_class: an `AbstractTrainer`.
        args: the words after the program's name; ``sys.argv`` without them.
        run: whether to run the subcommand. If False, it is only parsed and the trainer is made.
        prog: how the program is called in help and messages, ``{}`` for the subcommand.

    Attributes:
        trainer_class: as it was given.
        subcommand: the name of the subcommand.
        config: the configuration.
        arguments: all that was parsed, with the options of `add_arguments`, as objects.
        own: the options of the subcommand itself.
        trainer: the trainer, made from ``config``; None for commands that make their own:
            ``plan``, ``verify-resume``, ``find-lr`` and ``find-batch-size``.
        result: what the subcommand returned; None before it has run.

    Raises:
        SystemExit: with status 2 if the configuration cannot work, 1 if a checkpoint cannot be
            used, 130 after Ctrl-C; 0 after ``--help`` and ``--print_config``.
    """

    commands: ClassVar[Mapping[str, Command]] = COMMANDS
    """Subcommands by name; a subclass has ``{**DreamCLI.commands, "mine": Command(...)}``."""

    def __init__(
        self,
        trainer_class: type[AbstractTrainer],
        args: Sequence[str] | None = None,
        run: bool = True,
        *,
        prog: str | None = None,
    ) -> None:
        self.trainer_class: Any = trainer_class
        self.trainer: Any = None
        self.result: Any = None
        words = list(sys.argv[1:] if args is None else args)
        prog = prog or f"{Path(sys.argv[0]).name} {{}}"
        with exit_statuses(prog.partition(" ")[0], with_traceback="--debug" in words):
            self._parse(words, prog)
            command = self.commands[self.subcommand]
            # For a trainer of this process the devices of the run would have to be here.
            if command.makes_trainer:
                self.make_trainer()
            if run:
                self.result = command.run(self)

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Add options that are no fields of the configuration, or links, to the parser.

        Their values are in ``arguments``, in ``--print_config`` and in the run's ``config.yaml``.
        """

    def make_trainer(self) -> None:
        """Make ``trainer`` anew from ``config``."""
        self.trainer = self.trainer_class(self.config)
        if hasattr(self.trainer, "describe_config"):
            self.trainer.describe_config = self._describe

    def _parse(self, words: list[str], prog: str) -> None:
        with first_rank_speaks():
            # It looks at the first word alone: the others belong to the subcommand.
            commands = command_parser(prog.partition(" ")[0], False, self.commands)
            self.subcommand: str = commands.parse_args(words[:1]).command
            prog = prog.replace("{}", self.subcommand)
            config_class = config_class_of(self.trainer_class)
            self.own, words = split_own_options(
                self.commands[self.subcommand],
                words[1:],
                prog,
                [field.name for field in dataclasses.fields(config_class)],
            )
            # Here, because `dream-trainer --help` needs none of it.
            from dream_trainer.cli.config_parser import ConfigParser
            from dream_trainer.cli.presets import with_presets

            self._parser = ConfigParser(
                config_class,
                prog,
                getattr(self.trainer_class, "links", ()),
                self.add_arguments,
            )
            prints = "--print_config" in words and bool(self.own.preset)
            if prints:  # a configuration is printed as the presets leave it
                words = [word for word in words if word != "--print_config"]
            parsed = self._parser.parse(words)
        self._namespace = parsed.namespace
        self.config: Any
        with _drawing_from(parsed.namespace.get("seed", 0)):
            self.config, self.arguments = self._parser.instantiate(parsed.namespace)
            self.config, self._changes = with_presets(
                self.config, self.own.preset, self.trainer_class, parsed.options
            )
        if prints:
            with first_rank_speaks():
                print(self._parser.dump(self._namespace, self._changes), end="")
            raise SystemExit(0)

    def _describe(self, config: Any) -> str:
        """``config.yaml`` of a run: what was parsed, with the seed and the name it has got."""
        given = {"seed": config.seed, "experiment": config.experiment}
        return self._parser.dump(self._namespace, {**self._changes, **given})


@contextlib.contextmanager
def _drawing_from(seed: int | None) -> Iterator[None]:
    """Seeds what is drawn while objects are made, weights of a model in the configuration say.

    Otherwise they would be other ones in every process, and in a repetition of the run.

    Raises:
        ConfigError: something was drawn, and there is no seed yet.
    """
    from dream_trainer.randomness import derive, preserved, raw_state, seed_cpu

    def bytes_of_streams() -> tuple[bytes, ...]:
        # Not by pickle, which writes down where a tensor lies in memory.
        _, (_, words, *rest), of_torch = raw_state()
        return words.tobytes(), repr(rest).encode(), of_torch.numpy().tobytes()

    with preserved():
        if seed is not None:
            seed_cpu(derive(seed, "configuration"))
        # Not Python's own stream: modules that are loaded meanwhile, rich for one, draw from it.
        before = bytes_of_streams()
        yield
        if seed is None and bytes_of_streams() != before:
            raise ConfigError(
                "seed",
                ["is null, and making an object of the configuration drew random numbers"],
                "Give a seed, or make the object in configure_models or configure_dataloaders.",
            )
