"""A configuration dataclass as the options of a command, by jsonargparse."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from jsonargparse import (
    ArgumentParser,
    Namespace,
    set_dumper,
    set_loader,
    set_parsing_settings,
)

from dream_trainer.cli.config_files import merge_files, read_files
from dream_trainer.cli.explanations import explained
from dream_trainer.cli.value_types import register_value_types
from dream_trainer.configs.yaml_text import dump_yaml, load_yaml
from dream_trainer.errors import ConfigError

_FAILED = object()
_MODE = "dream_trainer_yaml"
set_loader(_MODE, load_yaml, (yaml.YAMLError,))
set_dumper(_MODE, dump_yaml)


class ConfigParser:
    """Options, files and defaults to an instance of a configuration dataclass, and to YAML.

    Args:
        config_class: the dataclass; every field becomes an option.
        prog: the command, for help and usage.
    """

    def __init__(self, config_class: type, prog: str) -> None:
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
            usage=f"{prog} [--config FILE ...] [--print_config] [options]",
            description="Precedence: defaults < files, in the order given < options.",
            allow_abbrev=False,
            exit_on_error=False,
            default_env=False,
            parser_mode=_MODE,
        )
        self._parser.add_argument(
            "--config",
            action="config",
            metavar="FILE",
            help="YAML file of options; may be repeated, later files win.",
        )
        self._parser.add_class_arguments(config_class)

    def parse(self, args: Sequence[str]) -> Namespace:
        """All options, complete, as plain data. ``--print_config`` and ``--help`` end here.

        Raises:
            ConfigError: naming the option, or the file and key.
        """
        paths, options = _split(args)
        files = {path: self._sections(path, text) for path, text in read_files(paths).items()}
        try:
            # As one file in front of all options: jsonargparse lets a file win over an option
            # that stands before it.
            return self._parser.parse_args([*self._as_options(merge_files(files)), *options])
        except argparse.ArgumentError as error:
            known = self._parser.get_defaults(skip_validation=True).keys()
            raise explained(str(error), files, options, known, self._parser.prog) from None
        except (ValueError, OSError, RecursionError) as error:
            raise ConfigError("options", [f"{type(error).__name__}: {error}"]) from None

    def instantiate(self, namespace: Namespace) -> Any:
        """The configuration.

        Raises:
            ConfigError: with the problems of every part of it.
        """
        errors: list[ConfigError] = []

        def make(made: type, *args: Any, **kwargs: Any) -> Any:
            # A part that failed has been reported; what contains it would only complain again.
            if any(value is _FAILED for value in kwargs.values()):
                return _FAILED
            try:
                return made(*args, **kwargs)
            except ConfigError as error:
                errors.append(error)
            except ValueError as error:
                errors.append(ConfigError(made.__name__, [str(error)]))
            return _FAILED

        parts = self._parser.instantiate(namespace, instantiators=[(make, object, True)])
        fields = (f.name for f in dataclasses.fields(self._config_class) if f.init)
        config = make(self._config_class, **{n: parts[n] for n in fields if n in parts})
        if len(errors) == 1:
            raise errors[0]
        if errors:
            problems = [f"{error.place}: {one}" for error in errors for one in error.problems]
            raise ConfigError(self._config_class.__name__, problems)
        return config

    def dump(self, namespace: Namespace, replace: Mapping[str, Any]) -> str:
        """What ``--print_config`` prints, with some top-level values replaced."""
        complete = namespace.clone()
        for name, value in replace.items():
            complete[name] = value
        return str(self._parser.dump(complete, skip_unset=False, skip_validation=True))

    def _sections(self, path: str, content: dict[str, Any]) -> dict[str, Any]:
        """A file's content, where a section with nothing in it counts as left out."""
        defaults = self._parser.get_defaults(skip_validation=True)
        sections = {name for name in content if isinstance(defaults.get(name), Namespace)}
        odd = [
            f"{name}: expected a mapping of options, got {content[name]!r}"
            for name in sections
            if not isinstance(content[name], (dict, str, type(None)))
        ]
        if odd:
            raise ConfigError(path, odd)
        return {k: v for k, v in content.items() if not (k in sections and v is None)}

    def _as_options(self, content: dict[str, Any]) -> list[str]:
        """What stands in files, as options that can be put in front of the others."""
        defaults = self._parser.get_defaults(skip_validation=True)
        merged = [
            f"--{name}.{key}={value if isinstance(value, str) else _one_document(value)}"
            for name, entries in content.items()
            # A file replaces a mapping, an option for one key of it leaves the others alone.
            if isinstance(entries, dict)
            and isinstance(default := defaults.get(name), dict)
            and default
            for key, value in entries.items()
        ]
        names = {option.removeprefix("--").partition(".")[0] for option in merged}
        rest = {name: value for name, value in content.items() if name not in names}
        return [*(["--config", dump_yaml(rest)] if rest else []), *merged]


def _one_document(value: Any) -> str:
    return dump_yaml(value).removesuffix("...\n").strip()


def _split(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Paths of ``--config``, and the other words in their order."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", action="append", default=[])
    try:
        found, others = parser.parse_known_args(args)
    except argparse.ArgumentError:
        raise ConfigError("--config", ["the name of a file is missing"]) from None
    return found.config, others
