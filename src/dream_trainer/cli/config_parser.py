"""A configuration dataclass as the options of a command, by jsonargparse."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import yaml
from jsonargparse import (
    ArgumentParser,
    Namespace,
    set_dumper,
    set_loader,
    set_parsing_settings,
)

from dream_trainer.cli.class_switch import class_of_default, switch_classes
from dream_trainer.cli.config_files import Given, read_file, read_section
from dream_trainer.cli.explanations import Explainer, Mistake, mistakes_of, raise_all
from dream_trainer.cli.given_options import GivenOption, Input, of_command_line, of_environment
from dream_trainer.cli.logger_options import with_loggers
from dream_trainer.cli.parsed_checks import (
    comments_for_null,
    is_section,
    nulls_for_values,
    section_problems,
    with_near_arguments,
)
from dream_trainer.cli.value_types import register_value_types
from dream_trainer.configs import Link
from dream_trainer.configs.yaml_text import dump_yaml, load_yaml
from dream_trainer.errors import ConfigError

ENVIRONMENT_PREFIX = "DREAM_TRAINER_"
PRECEDENCE = (
    "Precedence: defaults < files, in the order given < presets < environment "
    f"({ENVIRONMENT_PREFIX}TRAINING_PARAMETERS__MAX_STEPS) < options."
)
_FAILED = object()
_PRINT = "print_config"
_MODE = "dream_trainer_yaml"
_SIGNATURE = re.compile(r"(\w+)\(.*\):?", re.DOTALL)
#: A line of them has more wrong than anybody reads at once; each costs some runs of the parser.
_MOST_MISTAKES = 20


set_loader(_MODE, load_yaml, (yaml.YAMLError,))
set_dumper(_MODE, dump_yaml)


@dataclass(frozen=True)
class Parsed:
    """A command line that can be made a configuration.

    Args:
        namespace: all options, complete, as plain data.
        options: those that variables and the command line set.
    """

    namespace: Namespace
    options: Sequence[GivenOption]


class _Maker:
    """Makes the objects of a configuration, and collects what they refuse.

    An optimizer that waits for parameters is made later, by this too, in the run.
    """

    def __init__(self) -> None:
        self._errors: list[ConfigError] = []
        self._is_collecting = True

    def __call__(self, made: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # A part that failed has been reported; what contains it would only complain again.
        if any(_has_failed(value) for value in kwargs.values()):
            return _FAILED
        try:
            return made(*args, **kwargs)
        except (ValueError, ModuleNotFoundError) as error:  # a logger without its package
            name = getattr(made, "__name__", str(made))
            found = error if isinstance(error, ConfigError) else ConfigError(name, [str(error)])
            if not self._is_collecting:
                raise found from error
            self._errors.append(found)
            return _FAILED

    def end(self) -> list[ConfigError]:
        """What was wrong; from now on it is raised."""
        self._is_collecting = False
        return self._errors


def _has_failed(value: object) -> bool:
    if isinstance(value, dict):
        return any(one is _FAILED for one in value.values())
    return value is _FAILED


class ConfigParser:
    """Options, files and defaults to an instance of a configuration dataclass, and to YAML.

    Args:
        config_class: the dataclass; every field becomes an option.
        prog: the command, for help and usage.
        links: values that follow from others.
        add_arguments: given the jsonargparse parser, to add options that are no fields.
    """

    def __init__(
        self,
        config_class: type,
        prog: str,
        links: Iterable[Link] = (),
        add_arguments: Callable[[ArgumentParser], object] | None = None,
    ) -> None:
        register_value_types()
        set_parsing_settings(
            docstring_parse_attribute_docstrings=True,
            # Loggers and strategies are annotated with Any, and named by class path all the same.
            validate_subclass_spec_in_any=True,
            instantiate_subclass_spec_in_any=True,
        )
        self._config_class = config_class
        self._parser = ArgumentParser(
            prog=prog,
            usage=f"{prog} [--config FILE ...] [--preset NAME ...] [--print_config] [options]",
            description=PRECEDENCE,
            allow_abbrev=False,
            exit_on_error=False,
            default_env=False,
            parser_mode=_MODE,
        )
        self._parser.add_argument(
            "--config",
            action="config",
            metavar="FILE",
            help="YAML file of options; may be repeated, later files win. Its key _base_ names "
            "files that it is laid over. A section can have a file: --training_parameters a.yaml",
        )
        self._parser.add_class_arguments(config_class)
        for group in self._parser._action_groups:
            # A dataclass without a docstring has its signature for one: twenty lines, and no help.
            if (name := _SIGNATURE.match(str(group.title))) is not None:
                group.title = name[1]
        if add_arguments is not None:
            add_arguments(self._parser)
        for link in links:
            self._link(link)
        self._defaults = self._parser.get_defaults(skip_validation=True)
        self._known = list(self._defaults.keys(branches=True))
        self._sections = {
            name for name in self._known if isinstance(self._defaults.get(name), dict)
        } | {name for name, value in self._defaults.items(branches=True) if is_section(value)}

    def parse(self, args: Sequence[str]) -> Parsed:
        """All options. ``--print_config`` and ``--help`` end here.

        Raises:
            ConfigError: naming the file and line, the variable or the option of every mistake.
        """
        if asked := _help_in(args):
            self._help(asked)
        mistakes: list[Mistake] = []
        paths, words = _split(args, mistakes)
        options = of_command_line(words)
        prints = [one for one in options if one.name == _PRINT]
        options = [one for one in options if one not in prints]
        files, options = self._files(paths, options, mistakes)
        try:
            options = [*of_environment(os.environ, ENVIRONMENT_PREFIX, self._known), *options]
        except ConfigError as error:
            mistakes += mistakes_of(error)
        given, notes = with_loggers(Input(files, options))
        switched = switch_classes(given, self._defaults.get, self._find_class)
        # jsonargparse would carry the defaults of the old class over to the new one.
        self._parser.set_defaults(dict.fromkeys(switched.names & {*self._known}))
        for line in [*notes, *switched.notes]:
            print(line, file=sys.stderr)
        namespace = self._checked(switched.given, mistakes, prints)
        return Parsed(namespace, options)

    def instantiate(self, namespace: Namespace) -> tuple[Any, Namespace]:
        """The configuration, and everything else that was parsed.

        Raises:
            ConfigError: with the problems of every part of it.
        """
        make = _Maker()
        parts = self._parser.instantiate(namespace, instantiators=[(make, object, True)])
        fields = [f.name for f in dataclasses.fields(self._config_class) if f.init]
        config = make(self._config_class, **{n: parts[n] for n in fields if n in parts})
        raise_all([one for error in make.end() for one in mistakes_of(error)])
        return config, parts

    def dump(self, namespace: Namespace, replace: Mapping[str, Any]) -> str:
        """What ``--print_config`` prints, with some values replaced by dotted name."""
        complete = namespace.clone()
        for name, value in replace.items():
            complete[name] = value
        return str(self._parser.dump(complete, skip_unset=False, skip_validation=True))

    def _help(self, words: Sequence[str]) -> NoReturn:
        try:
            self._parser.parse_args(words)
        except argparse.ArgumentError as error:
            raise ConfigError(words[0].partition("=")[0], [error.message]) from None
        raise SystemExit(0)

    def _link(self, link: Link) -> None:
        try:
            self._parser.link_arguments(
                link.source, link.target, link.compute, apply_on=link.apply_on
            )
        except ValueError as error:
            raise ConfigError(
                f"the link from {link.source} to {link.target}", [str(error)]
            ) from None

    def _files(
        self, paths: Sequence[str], options: Sequence[GivenOption], mistakes: list[Mistake]
    ) -> tuple[Given, list[GivenOption]]:
        """What files set, those of sections too, and the options that name no file."""
        files, others = Given(), []

        def lay(read: Callable[..., Given], *args: Any) -> None:
            nonlocal files
            try:
                above = read(*args, self._sections)
                self._require_sections(above)
                files = above.over(files)
            except ConfigError as error:
                mistakes.extend(mistakes_of(error))

        for path in paths:
            lay(read_file, path)
        for one in options:
            if one.name in self._sections and _is_path(one.value):
                lay(read_section, one.value, one.name)
            else:
                others.append(one)
        for name in self._sections & files.content.keys():
            if files.content[name] is None:  # a section with nothing in it counts as left out
                del files.content[name]
        return files, others

    def _require_sections(self, given: Given) -> None:
        odd = [
            f"{name}: expected a mapping of options, got {given.content[name]!r}"
            for name in sorted(self._sections & given.content.keys())
            if not isinstance(given.content[name], (dict, type(None)))
        ]
        if odd:
            raise ConfigError(next(iter(given.places.values())).rpartition(":")[0], odd)

    def _find_class(self, option: str, name: str, given: Input) -> tuple[str, set[str]] | None:
        """The dotted name of a class and its arguments, if an option takes it."""
        default = self._defaults.get(option)
        if default is not None and class_of_default(default) is None:
            return None
        if option in self._known:
            self._parser.set_defaults({option: None})
        files = given.files.without(option.split("."))
        others = [one for one in given.options if not f"{one.name}.".startswith(f"{option}.")]
        probe = GivenOption(option, (f"--{option}={name}",), option)
        found = self._try(Input(files, [*others, probe]))
        if isinstance(found, Exception):
            return None
        spec = found.get(option)
        if spec is None and "." in option:
            above, _, entry = option.rpartition(".")
            mapping = found.get(above)
            spec = mapping.get(entry) if isinstance(mapping, dict) else None
        if not isinstance(spec, Namespace) or "class_path" not in spec:
            return None
        arguments = spec.get("init_args")
        return spec["class_path"], set(arguments.keys() if arguments is not None else ())

    def _checked(
        self, given: Input, mistakes: list[Mistake], prints: Sequence[GivenOption]
    ) -> Namespace:
        """Parse, and if that fails again without what was wrong, until all of it is known.

        jsonargparse stops at the first mistake.
        """
        is_all_read = not mistakes
        explainer = Explainer(self._known, self._classes(), self._parser.prog, self._try)
        while isinstance(parsed := self._try(given), Exception):
            found, rest = explainer.explain(parsed, given)
            # What was dropped as wrong, or may stand in a file that cannot be read, is not missing.
            wrong = {one.key for one in mistakes}
            mistakes += [
                one for one in found if not one.is_missing or (is_all_read and one.key not in wrong)
            ]
            if rest is None or len(mistakes) >= _MOST_MISTAKES:
                break
            given = rest
        if prints and all(one.is_missing for one in mistakes):
            # What is missing is to be filled in; this ends the program.
            self._parser.parse_args([*self._words(given), *prints[-1].words])
        if isinstance(parsed, Exception):
            raise_all(mistakes)
            raise parsed
        mistakes = with_near_arguments(mistakes, parsed)
        mistakes += comments_for_null(given, parsed)
        mistakes += nulls_for_values(given, parsed, self._known, self._defaults.get, self._try)
        raise_all([*mistakes, *(section_problems(self._config_class, parsed) if mistakes else ())])
        return parsed

    def _try(self, given: Input) -> Namespace | Exception:
        try:
            return self._parser.parse_args(self._words(given))
        except (argparse.ArgumentError, ValueError, OSError, RecursionError, TypeError) as error:
            return error

    def _words(self, given: Input) -> list[str]:
        # Files first: jsonargparse lets a file win over an option that stands before it.
        words = [word for one in given.options for word in one.words]
        return [*self._as_options(given.files.content), *words]

    def _classes(self) -> list[str]:
        """Short names of classes that somebody may have meant."""
        homes = [self._config_class.__module__, "torch.optim", "torch.optim.lr_scheduler"]
        spaces = [vars(sys.modules[home]) for home in homes if home in sys.modules]
        return [name for one in spaces for name, value in one.items() if isinstance(value, type)]

    def _as_options(self, content: dict[str, Any]) -> list[str]:
        """What stands in files, as options that can be put in front of the others."""
        merged = [
            f"--{name}.{key}={value if isinstance(value, str) else _one_document(value)}"
            for name, entries in content.items()
            # A file replaces a mapping, an option for one key of it leaves the others alone.
            if isinstance(entries, dict)
            and isinstance(default := self._defaults.get(name), dict)
            and default
            for key, value in entries.items()
        ]
        names = {option.removeprefix("--").partition(".")[0] for option in merged}
        rest = {name: value for name, value in content.items() if name not in names}
        return [*(["--config", dump_yaml(rest)] if rest else []), *merged]


def _is_path(value: str | None) -> bool:
    """Whether it is no mapping that is written out."""
    text = (value or "").strip()
    return bool(text) and not text.startswith(("{", "[")) and text.lower() not in ("null", "~")


def _one_document(value: Any) -> str:
    return dump_yaml(value).removesuffix("...\n").strip()


def _help_in(args: Sequence[str]) -> list[str]:
    """The words that ask for help, which no mistake in others should withhold."""
    for position, word in enumerate(args):
        name, equals, _ = word.partition("=")
        if word in ("-h", "--help"):
            return ["--help"]
        if name.startswith("--") and name.endswith(".help"):
            return [word] if equals else list(args[position : position + 2])
    return []


def _split(args: Sequence[str], mistakes: list[Mistake]) -> tuple[list[str], list[str]]:
    """Paths of ``--config``, and the other words in their order."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", action="append", default=[])
    try:
        found, others = parser.parse_known_args(args)
    except argparse.ArgumentError:
        mistakes.append(Mistake("--config", "the name of a file is missing"))
        return [], [word for word in args if word != "--config"]
    return found.config, others
