"""YAML in which what is written is what is read: ``1e-3`` is a number, a date or time is text."""

from __future__ import annotations

import re
from typing import Any

import yaml

from dream_trainer.configs.quantities import Duration, Size

_FLOAT = "tag:yaml.org,2002:float"
_TIMESTAMP = "tag:yaml.org,2002:timestamp"
_TEXT = "tag:yaml.org,2002:str"
_CLOCK = re.compile(r"^[-+]?[0-9]+(?::[0-9]+)+(?:\.[0-9]*)?$")
_WITH_EXPONENT = re.compile(r"^[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+$")


class ConfigLoader(yaml.SafeLoader):
    """Reads the YAML of configurations."""


class _Dumper(yaml.SafeDumper):
    pass


# Both must know the same numbers, or the text "1e3" would be written bare and come back as 1000.
ConfigLoader.add_implicit_resolver(_FLOAT, _WITH_EXPONENT, list("-+0123456789"))
_Dumper.add_implicit_resolver(_FLOAT, _WITH_EXPONENT, list("-+0123456789"))
ConfigLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _TIMESTAMP]
    for first, resolvers in ConfigLoader.yaml_implicit_resolvers.items()
}
for _first in "-+0123456789":
    # YAML 1.1 reads 1:30:00 as the number 5400. The dumper quotes it, for other readers.
    ConfigLoader.yaml_implicit_resolvers.setdefault(_first, []).insert(0, (_TEXT, _CLOCK))


def _represented(dumper: _Dumper, value: Duration | Size) -> yaml.Node:
    return dumper.represent_data(value.plain)


_Dumper.add_representer(Duration, _represented)
_Dumper.add_representer(Size, _represented)


def load_yaml(text: str) -> Any:
    """Plain data from YAML text.

    Raises:
        yaml.YAMLError: the text is no YAML.
    """
    return yaml.load(text, Loader=ConfigLoader)  # a subclass of SafeLoader


def dump_yaml(value: Any) -> str:
    """Plain data as YAML text, in the order it has."""
    return str(yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True))
