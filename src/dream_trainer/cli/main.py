"""The ``dream-trainer`` command: a trainer class that is named on the command line."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dream_trainer.cli.checkpoints import checkpoints
from dream_trainer.cli.commands import command_parser
from dream_trainer.cli.completion import completion
from dream_trainer.cli.dream_cli import DreamCLI
from dream_trainer.cli.export import export
from dream_trainer.cli.messages import exit_statuses, first_rank_speaks
from dream_trainer.cli.report import report
from dream_trainer.errors import ConfigError

_PROG = "dream-trainer"
_WITHOUT_TRAINER = {
    "checkpoints": checkpoints,
    "completion": completion,
    "export": export,
    "report": report,
}


def main(args: Sequence[str] | None = None) -> None:
    """Run ``dream-trainer COMMAND MODULE:CLASS [options]``, or a command without a trainer.

    Args:
        args: the words after the program's name; ``sys.argv`` without them.
    """
    words = list(sys.argv[1:] if args is None else args)
    with exit_statuses(_PROG, with_traceback="--debug" in words):
        with first_rank_speaks():
            # A trainer's own options begin after its name.
            own = words if words[:1] and words[0] in _WITHOUT_TRAINER else words[:2]
            first = command_parser(_PROG, target=True).parse_args(own)
        if first.command in _WITHOUT_TRAINER:
            _WITHOUT_TRAINER[first.command](first)
            return
        trainer_class = load_class(first.target)
    DreamCLI(trainer_class, [first.command, *words[2:]], prog=f"{_PROG} {{}} {first.target}")


def load_class(target: str) -> Any:
    """The class at ``my_package.train:MyTrainer`` or ``path/to/train.py:MyTrainer``.

    Raises:
        ConfigError: there is no such module or class, or the module cannot be imported.
    """
    module_name, _, class_name = target.rpartition(":")
    if not module_name or not class_name:
        raise ConfigError(target, ["the trainer is named MODULE:CLASS"])
    module = _load_file(module_name) if module_name.endswith(".py") else _load_module(module_name)
    found = getattr(module, class_name, None)
    if not isinstance(found, type):
        there = ", ".join(name for name, one in vars(module).items() if _is_trainer(one, module))
        raise ConfigError(
            target,
            [f"{module_name} has no class {class_name}"],
            f"Its trainers: {there or 'none'}.",
        )
    if not _is_trainer(found):
        raise ConfigError(
            target, ["it is no trainer"], "Derive it from dream_trainer.DreamTrainer."
        )
    return found


def _is_trainer(one: Any, module: Any = None) -> bool:
    # By its methods: importing AbstractTrainer would load torch for a module that does not.
    is_class = isinstance(one, type) and hasattr(one, "fit") and hasattr(one, "named_optimizers")
    return is_class and (module is None or one.__module__ == module.__name__)


def _load_module(name: str) -> Any:
    # An installed script does not look for modules where it is called, as `python -m` does.
    _look_in(Path.cwd())
    return _import(name)


def _load_file(name: str) -> Any:
    path = Path(name).resolve()
    if not path.is_file():
        raise ConfigError(name, ["there is no such file"])
    # Under its own name, or worker processes could not find its classes again.
    _look_in(path.parent)
    module = _import(path.stem)
    if Path(getattr(module, "__file__", None) or "").resolve() != path:
        raise ConfigError(name, [f"{path.stem} is also the name of {module}"], "Rename the file.")
    return module


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and f"{name}.".startswith(f"{missing}."):
            raise ConfigError(name, [f"there is no module {missing}"]) from None
        # Here, because completion and `--help` need none of it.
        from dream_trainer.cli.explanations import import_problem

        move = "--debug shows the traceback."
        raise ConfigError("MODULE:CLASS", [import_problem(name, error)], move) from error


def _look_in(directory: Path) -> None:
    if str(directory) not in sys.path:
        sys.path.insert(0, str(directory))
