"""The configuration dataclass of a trainer class."""

from __future__ import annotations

import dataclasses
import inspect
import sys
import types
import typing

from dream_trainer.errors import ConfigError


def config_class_of(trainer_class: type) -> type:
    """The dataclass that annotates ``config`` on a trainer class.

    Raises:
        ConfigError: there is no such annotation, or it is no dataclass.
    """
    for owner in trainer_class.__mro__:
        annotation = inspect.get_annotations(owner).get("config")
        if annotation is not None:
            break
    else:
        raise _no_config(trainer_class, "it does not annotate 'config'")
    # Only this one: other annotations may name what is imported for type checkers alone.
    holder = types.SimpleNamespace(__annotations__={"config": annotation})
    names = vars(sys.modules[owner.__module__])
    try:
        found = typing.get_type_hints(holder, names, dict(vars(owner)))["config"]
    except NameError as error:
        raise _no_config(trainer_class, f"the annotation of 'config' names {error}") from None
    if not (isinstance(found, type) and dataclasses.is_dataclass(found)):
        raise _no_config(trainer_class, f"'config' is annotated with {found}, no dataclass")
    return found


def _no_config(trainer_class: type, problem: str) -> ConfigError:
    return ConfigError(
        trainer_class.__name__,
        [problem],
        "Annotate it on the class: 'config: MyConfig', a dataclass at the top of its module.",
    )
