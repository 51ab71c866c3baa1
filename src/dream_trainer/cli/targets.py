"""Finds trainers by how a command line names them, without importing their modules."""

from __future__ import annotations

import ast
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from dream_trainer.cli.source_classes import SourceClass, SourceModule, Sources, dotted_name
from dream_trainer.cli.source_options import TrainerSource, is_trainer


def named_trainer(target: str, folder: Path) -> TrainerSource | None:
    """The trainer at ``module:Class`` or ``file.py:Class``; None if no source shows it."""
    sources = Sources(_places(target, folder))
    module_name, _, name = target.rpartition(":")
    module = _module(sources, module_name, folder) if module_name else None
    found = sources.meaning(module, name) if module is not None else None
    return TrainerSource(sources, found) if isinstance(found, SourceClass) else None


def trainer_of_script(script: Path, folder: Path) -> TrainerSource | None:
    """The trainer that a script hands to ``DreamCLI``."""
    sources = Sources([script.parent, folder])
    module = sources.file(script)
    for node in ast.walk(module.tree):
        if not isinstance(node, ast.Call):
            continue
        if (dotted_name(node.func) or "").rpartition(".")[2] != "DreamCLI":
            continue
        named = [one.value for one in node.keywords if one.arg == "trainer_class"]
        name = dotted_name(next(iter([*node.args, *named]), None))
        found = sources.meaning(module, name) if name else None
        if isinstance(found, SourceClass):
            return TrainerSource(sources, found)
    return None


def started_script(words: Sequence[str], folder: Path) -> tuple[int, Path] | None:
    """Where in a command line a script that uses ``DreamCLI`` stands, and its file."""
    for position, word in enumerate(words):
        path: Path | None = folder / Path(word).expanduser()
        if position == 0 and "/" not in word:
            path = Path(shutil.which(word) or word)
        elif position and words[position - 1] == "-m":
            module = Sources([folder]).module(word)
            path = module.path if module else None
        elif position and not word.endswith(".py"):
            continue
        if path is not None and _uses_dream_cli(path):
            return position, path
        if position:
            return None  # another program: what follows are its own words
    return None


def targets(word: str, folder: Path) -> dict[str, str]:
    """Beginnings of ``module:Class`` and ``file.py:Class``, and a line about each class."""
    if ":" in word:
        name = word.rpartition(":")[0]
        sources = Sources(_places(word, folder))
        module = _module(sources, name, folder)
        classes = sources.classes(module) if module is not None else []
        there = [one for one in classes if is_trainer(sources, one)]
        return {f"{name}:{one.node.name}": _summary(one) for one in there}
    modules = dict.fromkeys(_modules(word, folder), "") if "/" not in word else {}
    fitting = [name for name in modules if name.startswith(word)]
    return modules if fitting else dict.fromkeys(_files(word, folder), "")


def _places(target: str, folder: Path) -> list[Path]:
    path = target.rpartition(":")[0] or target
    return [(folder / path).parent, folder] if path.endswith(".py") else [folder]


def _module(sources: Sources, name: str, folder: Path) -> SourceModule | None:
    if name.endswith(".py"):
        return sources.file(folder / name) if (folder / name).is_file() else None
    return sources.module(name)


def _modules(word: str, folder: Path) -> Iterator[str]:
    above = word.rpartition(".")[0]
    inside = folder.joinpath(*above.split(".")) if above else folder
    prefix = f"{above}." if above else ""
    for path in _listed(inside):
        if path.suffix == ".py" and path.stem.isidentifier() and _may_have_trainers(path):
            yield f"{prefix}{path.stem}:"
        elif path.is_dir() and path.name.isidentifier() and any(path.glob("*.py")):
            yield f"{prefix}{path.name}."


def _files(word: str, folder: Path) -> Iterator[str]:
    above = word[: word.rfind("/") + 1]
    for path in _listed(folder / Path(above).expanduser()):
        if path.suffix == ".py" and _may_have_trainers(path):
            yield f"{above}{path.name}:"
        elif path.is_dir():
            yield f"{above}{path.name}/"


def _listed(folder: Path) -> list[Path]:
    try:
        there = sorted(folder.iterdir())
    except OSError:
        return []
    return [path for path in there if path.name[0] not in "._"]


def _may_have_trainers(path: Path) -> bool:
    try:
        return b"Trainer" in path.read_bytes()
    except OSError:
        return False


def _summary(one: SourceClass) -> str:
    return (ast.get_docstring(one.node) or "").partition("\n")[0]


def _uses_dream_cli(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            # Only a script: an interpreter is large.
            return not file.read(4).startswith(b"\x7fELF") and b"DreamCLI(" in path.read_bytes()
    except OSError:
        return False
