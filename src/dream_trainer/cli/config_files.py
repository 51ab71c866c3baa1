"""Configuration files: reading YAML and laying one file over another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dream_trainer.configs.yaml_text import load_yaml
from dream_trainer.errors import ConfigError


def read_files(paths: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The content of each file, by path and in order.

    Raises:
        ConfigError: of the first file that cannot be read.
    """
    return {path: _read(path) for path in paths}


def merge_files(files: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """One mapping out of several; where two set the same key, the later wins."""
    merged: dict[str, Any] = {}
    for content in files.values():
        merged = _merge(merged, content)
    return merged


def has_key(content: Any, key: str) -> bool:
    """Whether a file sets a dotted key."""
    for part in key.split("."):
        if not isinstance(content, Mapping) or part not in content:
            return False
        content = content[part]
    return True


def _read(path: str) -> dict[str, Any]:
    try:
        content = load_yaml(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(path, ["there is no such file"]) from None
    except OSError as error:
        raise ConfigError(path, [f"cannot be read ({error.strerror})"]) from None
    except UnicodeDecodeError:
        raise ConfigError(path, ["is not a text file in UTF-8"]) from None
    except yaml.YAMLError as error:
        raise ConfigError(path, [_words(error)]) from None
    except (RecursionError, ValueError) as error:
        raise ConfigError(path, [f"is not a configuration ({error})"]) from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(path, ["is not a mapping of option names to values"])
    return content


def _words(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return f"{place}broken YAML, {problem}"


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping) and not _switches(old, value):
            merged[key] = _merge(old, value)
        else:
            merged[key] = value
    return merged


def _switches(below: Mapping[str, Any], above: Mapping[str, Any]) -> bool:
    """Whether the upper mapping names another class, whose arguments are its own."""
    old, new = str(below.get("class_path", "")), str(above.get("class_path", ""))
    if not old or not new:
        return bool(new)
    # A class may be named in full in one file and by its last part in the other.
    return not (old == new or old.endswith(f".{new}") or new.endswith(f".{old}"))
