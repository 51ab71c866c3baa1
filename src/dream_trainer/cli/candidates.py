"""What the last word of a command line can become. Nothing of the user's is imported."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dream_trainer.cli.commands import COMMANDS, command_parser, own_options
from dream_trainer.cli.source_options import TrainerSource
from dream_trainer.cli.targets import named_trainer, started_script, targets, trainer_of_script

PROGRAM = "dream-trainer"
#: Options of all commands that read a configuration, which no dataclass has.
_CONFIG_OPTIONS = {
    "--config": "YAML file of options; may be repeated, later files win",
    "--print_config": "print the complete configuration and stop",
    "--help": "list all options",
}
_FLAGS = {"--print_config", "--help", "-h"}


@dataclass
class Candidates:
    """What the last word can become.

    Args:
        words: whole words, with a line of help each or none. One that ends in ``.``, ``:``,
            ``/`` or ``=`` is not finished yet.
        files: whether names of files fit as well.
        ours: whether the command line is one of this package's programs at all.
    """

    words: dict[str, str] = field(default_factory=dict)
    files: bool = False
    ours: bool = True


def candidates(words: Sequence[str], folder: Path) -> Candidates:
    """The words that the last one, which may be empty, can become.

    Args:
        words: the command line, from the program to the word under the cursor.
        folder: where the command would run.
    """
    found = _candidates(list(words), folder)
    fitting = {word: text for word, text in found.words.items() if word.startswith(words[-1])}
    return Candidates(fitting, found.files, found.ours)


def _candidates(words: list[str], folder: Path) -> Candidates:
    if Path(words[0]).name == PROGRAM:
        return _of_command(command_parser(PROGRAM, target=True), words[1:], folder, None)
    started = started_script(words[:-1], folder)
    if started is None:
        return Candidates(ours=False)
    position, script = started
    parser = command_parser(script.name, target=False)
    return _of_command(parser, words[position + 1 :], folder, script)


def _of_command(
    parser: argparse.ArgumentParser, words: list[str], folder: Path, script: Path | None
) -> Candidates:
    """Walks down the subcommands, and on to a trainer's options where they begin."""
    options = {name: one for one in parser._actions for name in one.option_strings}
    positions = [one for one in parser._actions if not one.option_strings]
    commands = next((one for one in positions if isinstance(one, argparse._SubParsersAction)), None)
    if commands is None and (not positions or positions[0].dest == "target"):
        if positions and len(words) == 1:
            return Candidates(targets(words[0], folder))
        if script is not None:
            trainer = trainer_of_script(script, folder)
        else:
            trainer = named_trainer(words.pop(0), folder) if positions else None
        command = COMMANDS.get(name := _command(parser))
        own = own_options(command, name)._actions if command is not None else []
        options |= {name: one for one in own for name in one.option_strings}
        return _ConfigCandidates(options, trainer).of(words)
    *before, last = words
    while before:
        word = before.pop(0)
        if word in options:
            if options[word].nargs != 0 and not before:
                return _of_action(options[word])
            del before[: options[word].nargs != 0]
        elif commands is not None:
            below = commands.choices.get(word)
            return _of_command(below, [*before, last], folder, script) if below else Candidates()
    if last.startswith("-"):
        return Candidates({name: one.help or "" for name, one in options.items() if _shown(one)})
    if commands is not None:
        return Candidates({one.dest: one.help or "" for one in commands._choices_actions})
    found = [_of_action(one) for one in positions]
    words_of = {word: "" for one in found for word in one.words}
    return Candidates(words_of, files=any(one.files for one in found) and not words_of)


def _command(parser: argparse.ArgumentParser) -> str:
    return parser.prog.rpartition(" ")[2]


def _shown(action: argparse.Action) -> bool:
    return action.help != argparse.SUPPRESS


def _of_action(action: argparse.Action) -> Candidates:
    words = {str(choice): "" for choice in action.choices or ()}
    return Candidates(words, files=not words)


@dataclass
class _ConfigCandidates:
    """Options of a trainer's configuration, and their values.

    Args:
        declared: options of the command itself.
        trainer: None if the source does not tell.
    """

    declared: Mapping[str, argparse.Action]
    trainer: TrainerSource | None

    def of(self, words: Sequence[str]) -> Candidates:
        """What the last word can become, of those behind the subcommand and the target."""
        *before, last = words
        given = _given(before)
        option, equals, _ = last.partition("=")
        if option.startswith("--") and equals:
            found = self._values(option, given)
            return Candidates({f"{option}={word}": "" for word in found.words}, found.files)
        previous = before[-1] if before else ""
        expects = previous.startswith("--") and "=" not in previous and not self._is_flag(previous)
        if expects and not last.startswith("--"):
            return self._values(previous, given)
        return Candidates(self._options(last.removeprefix("--").rpartition(".")[0], given))

    def _options(self, above: str, given: Mapping[str, str]) -> dict[str, str]:
        found: dict[str, str] = {}
        if not above:
            found |= {name: one.help or "" for name, one in self.declared.items() if _shown(one)}
            found |= _CONFIG_OPTIONS
        for one in self.trainer.options(above, given) if self.trainer else ():
            path = f"{above}.{one.name}".lstrip(".")
            if one.values.is_section:
                found[f"--{path}."] = one.help
                continue
            found[f"--{path}"] = one.help
            if one.values.bases and one.name != "help":
                found[f"--{path}."] = "its arguments"
        return found

    def _values(self, option: str, given: Mapping[str, str]) -> Candidates:
        if option == "--preset":
            return Candidates(dict.fromkeys(self.trainer.presets() if self.trainer else (), ""))
        if option in self.declared:
            return _of_action(self.declared[option])
        if option in _CONFIG_OPTIONS:
            return Candidates(files=option == "--config")
        if self.trainer is None:
            return Candidates(files=True)
        one = self.trainer.option(option.removeprefix("--"), given)
        if one is None:
            return Candidates(files=True)
        words = [*one.values.words, *self.trainer.class_names(one.values)]
        # A section can be given as a file of its own.
        return Candidates(dict.fromkeys(words, ""), one.values.text or one.values.is_section)

    def _is_flag(self, option: str) -> bool:
        declared = self.declared.get(option)
        return option in _FLAGS or (declared is not None and declared.nargs == 0)


def _given(words: Iterable[str]) -> dict[str, str]:
    """Options of a command line and their values; of several for one the last."""
    found: dict[str, str] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name, _, value = word.removeprefix("--").partition("=")
            found[name] = value
        elif name:
            found[name] = word
    return found
