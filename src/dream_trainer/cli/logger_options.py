"""Options that name loggers, whose annotation tells jsonargparse nothing."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from dream_trainer.cli.class_switch import note_of_switch
from dream_trainer.cli.config_files import Given, same_class
from dream_trainer.cli.given_options import GivenOption, Input
from dream_trainer.configs.yaml_text import load_yaml

_MAPPING = "loggers"
#: Where a logger with a short name is looked for.
_HOMES = ("lightning.fabric.loggers", "lightning.pytorch.loggers")


def with_loggers(given: Input) -> tuple[Input, list[str]]:
    """Variables and options that name loggers become part of what files give.

    Returns:
        What is given then, and a line about each class that took the place of another one.
    """
    files, notes, others = _named_in_full(given.files), list[str](), list[GivenOption]()
    for option in given.options:
        parts = option.name.split(".")
        if parts[0] != _MAPPING or len(parts) == 1 or option.value is None:
            others.append(option)
            continue
        logger, *below = parts[1:]
        old = (files.content.get(_MAPPING) or {}).get(logger)
        value = _read(option.value)
        if not below and isinstance(value, str):
            value, told = _switched(_full_name(value), old, option.place)
            notes += told
        elif below == ["class_path"]:
            value = {"class_path": _full_name(option.value)}
        elif below:
            below = below[1:] if below[0] == "init_args" else below
            value = {"init_args": {".".join(below): value}}
        files = _set(logger, value, option.place).over(files)
    return Input(files, others), notes


def _named_in_full(files: Given) -> Given:
    entries = files.content.get(_MAPPING)
    if not isinstance(entries, Mapping):
        return files
    for name, spec in entries.items():
        if isinstance(spec, Mapping) and isinstance(spec.get("class_path"), str):
            full = {**spec, "class_path": _full_name(spec["class_path"])}
            files = Given({_MAPPING: {name: full}}).over(files)
        elif isinstance(spec, str):
            files = Given({_MAPPING: {name: {"class_path": _full_name(spec)}}}).over(files)
    return files


def _set(logger: str, value: Any, place: str) -> Given:
    names = ["", ".class_path", *(f".init_args.{name}" for name in _arguments(value))]
    return Given(
        {_MAPPING: {logger: value}}, {f"{_MAPPING}.{logger}{name}": place for name in names}
    )


def _arguments(value: Any) -> Sequence[str]:
    return list(value.get("init_args") or ()) if isinstance(value, Mapping) else []


def _switched(new: str, old: Any, place: str) -> tuple[dict[str, Any], list[str]]:
    """The new logger with those arguments of the old one that it has, and a line about it."""
    arguments = old.get("init_args") if isinstance(old, Mapping) else None
    if not arguments:
        return {"class_path": new}, []
    if same_class(str(old.get("class_path", new)), new):
        return {"class_path": new, "init_args": arguments}, []
    found = _class(new)
    accepted = inspect.signature(found).parameters if found is not None else {}
    kept = {name: value for name, value in arguments.items() if name in accepted}
    dropped = [name for name in arguments if name not in accepted]
    shown = {name: repr(value) for name, value in kept.items()}
    told = note_of_switch(place, old["class_path"], new, shown, dropped)
    return {"class_path": new, "init_args": kept}, told


def _full_name(name: str) -> str:
    if "." in name:
        return name
    for home in _HOMES:
        try:
            if hasattr(importlib.import_module(home), name):
                return f"{home}.{name}"
        except ImportError:
            continue
    return name


def _class(name: str) -> Any:
    module, _, last = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), last, None)
    except (ImportError, ValueError):
        return None


def _read(text: str) -> Any:
    try:
        return load_yaml(text)
    except yaml.YAMLError:
        return text
