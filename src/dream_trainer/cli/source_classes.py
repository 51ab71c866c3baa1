"""Python source, read and not run: modules, the names they bind, classes and their bases."""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

#: Never opened: large, or of no interest. Their names stand for themselves.
_NOT_READ = {*sys.stdlib_module_names, "torch", "lightning", "numpy", "pytorch_lightning"}
_LONGEST_CHAIN = 30


class SourceModule:
    """A module or package.

    Args:
        name: its dotted name.
        path: its source; None for a folder without ``__init__.py``.
        folders: where its submodules are.
    """

    def __init__(self, name: str, path: Path | None, folders: Sequence[str]) -> None:
        self.name, self.path, self.folders = name, path, tuple(folders)

    @cached_property
    def tree(self) -> ast.Module:
        """What is written; nothing where that cannot be read."""
        try:
            return ast.parse(self.path.read_bytes() if self.path else b"")
        except (OSError, SyntaxError, ValueError, RecursionError):
            return ast.Module(body=[], type_ignores=[])

    @cached_property
    def bindings(self) -> dict[str, ast.AST | str]:
        """Names of the module: a class, an assigned expression, or the dotted name of an import.

        Stars are bound as ``*`` and the name of their module.
        """
        found: dict[str, ast.AST | str] = {}
        for node in statements(self.tree.body):
            if isinstance(node, ast.ClassDef):
                found[node.name] = node
            elif isinstance(node, ast.Import):
                for one in node.names:
                    bound = one.asname or one.name.partition(".")[0]
                    found[bound] = one.name if one.asname else bound
            elif isinstance(node, ast.ImportFrom):
                source = self._imported(node)
                for one in node.names:
                    star = one.name == "*"
                    key = f"*{source}" if star else one.asname or one.name
                    found[key] = source if star else f"{source}.{one.name}"
            else:
                found |= {name: value for name, value in assigned(node) if value is not None}
        return found

    def _imported(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        # A package's own name is what one dot in its __init__ means.
        parts = self.name.split(".")
        parts = parts[: len(parts) - node.level + bool(self.folders)]
        return ".".join([*parts, *([node.module] if node.module else [])])


@dataclass(frozen=True)
class SourceClass:
    """A class statement and the module that it stands in."""

    module: SourceModule
    node: ast.ClassDef

    @property
    def name(self) -> str:
        """Its dotted name."""
        return f"{self.module.name}.{self.node.name}"


@dataclass(frozen=True)
class Alias:
    """An expression that a module gives a name."""

    module: SourceModule
    node: ast.AST


class Sources:
    """Finds modules as an import would, and what names mean in them; imports nothing.

    Args:
        folders: where modules are looked for before ``sys.path``.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = [str(folder) for folder in folders]
        self._modules: dict[str, SourceModule | None] = {}

    def module(self, name: str) -> SourceModule | None:
        """The module of a dotted name; None if there is none with a source."""
        if name not in self._modules:
            self._modules[name] = self._find(name)
        return self._modules[name]

    def file(self, path: Path) -> SourceModule:
        """The module that a file is, imported from its own folder."""
        module = self._modules[path.stem] = SourceModule(path.stem, path, ())
        return module

    def defined(self, name: str) -> SourceClass | None:
        """The class of a dotted name; None if the sources that are opened do not show it."""
        module, _, last = name.rpartition(".")
        home = self.module(module) if module else None
        # Where it is said to be defined it is looked for even in packages that are not opened.
        node = home.bindings.get(last) if home else None
        if home is not None and isinstance(node, ast.ClassDef):
            return SourceClass(home, node)
        found = self._absolute(name, _LONGEST_CHAIN)
        return found if isinstance(found, SourceClass) else None

    def meaning(self, module: SourceModule, dotted: str) -> SourceClass | Alias | str:
        """What a name in a module stands for; its dotted name where that is not in a source."""
        return self._meaning(module, dotted, _LONGEST_CHAIN)

    def lineage(self, one: SourceClass) -> Iterator[SourceClass | str]:
        """A class and what it derives from, the nearest first; each once."""
        seen: set[str] = set()
        waiting: list[SourceClass | str] = [one]
        while waiting:
            here = waiting.pop(0)
            name = here if isinstance(here, str) else here.name
            if name in seen:
                continue
            seen.add(name)
            yield here
            if isinstance(here, SourceClass):
                named = (dotted_name(base) for base in here.node.bases)
                bases = [self.meaning(here.module, name) for name in named if name]
                waiting[:0] = [base for base in bases if not isinstance(base, Alias)]

    def opened_lineage(self, one: SourceClass) -> Iterator[SourceClass]:
        """As `lineage`, without the bases that are not in a source."""
        return (owner for owner in self.lineage(one) if isinstance(owner, SourceClass))

    def classes(self, module: SourceModule) -> list[SourceClass]:
        """The classes that are defined at the top of a module."""
        there = module.bindings.values()
        return [SourceClass(module, node) for node in there if isinstance(node, ast.ClassDef)]

    def _find(self, name: str) -> SourceModule | None:
        parent, _, last = name.rpartition(".")
        spec: ModuleSpec | None
        try:
            if parent:
                package = self.module(parent)
                spec = PathFinder.find_spec(name, package.folders) if package else None
            else:
                # The second one also knows the finders of editable installs.
                spec = PathFinder.find_spec(last, self._folders) or importlib.util.find_spec(last)
        except (ImportError, ValueError):
            return None
        if spec is None:
            return None
        folders = list(spec.submodule_search_locations or ())
        path = Path(spec.origin) if spec.has_location and spec.origin else None
        if path is None or path.suffix != ".py":
            return SourceModule(name, None, folders) if folders else None
        return SourceModule(name, path, folders)

    def _meaning(self, module: SourceModule, dotted: str, left: int) -> SourceClass | Alias | str:
        head, _, rest = dotted.partition(".")
        bound = module.bindings.get(head)
        if left == 0:
            return dotted
        if bound is None:
            for key, source in module.bindings.items():
                if not key.startswith("*"):
                    continue
                found = self._absolute(f"{source}.{dotted}", left - 1)
                if not isinstance(found, str):
                    return found
            return dotted
        if isinstance(bound, str):
            return self._absolute(f"{bound}.{rest}".rstrip("."), left - 1)
        if isinstance(bound, ast.ClassDef):
            return _within(SourceClass(module, bound), rest) or f"{module.name}.{dotted}"
        other = dotted_name(bound) if isinstance(bound, (ast.Name, ast.Attribute)) else None
        if other == head:
            return dotted
        if other is not None:
            return self._meaning(module, f"{other}.{rest}".rstrip("."), left - 1)
        return f"{module.name}.{dotted}" if rest else Alias(module, bound)

    def _absolute(self, dotted: str, left: int) -> SourceClass | Alias | str:
        head, _, rest = dotted.partition(".")
        if head in _NOT_READ or left == 0:
            return dotted
        module = self.module(head)
        while module is not None and rest:
            name, _, after = rest.partition(".")
            if name in module.bindings or any(key.startswith("*") for key in module.bindings):
                found = self._meaning(module, rest, left - 1)
                if not isinstance(found, str) or name in module.bindings:
                    return found
            module, rest = self.module(f"{module.name}.{name}"), after
        return dotted


def statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a body, and of its conditions; of two for one name the last counts."""
    for node in body:
        yield node
        if isinstance(node, ast.If):
            yield from statements(node.body)
            yield from statements(node.orelse)
        elif isinstance(node, ast.Try):
            for handler in node.handlers:
                yield from statements(handler.body)
            yield from statements(node.body)


def assigned(node: ast.stmt) -> Iterator[tuple[str, ast.expr | None]]:
    """The plain names that a statement assigns, and their values."""
    if isinstance(node, ast.Assign):
        for target in node.targets:
            if isinstance(target, ast.Name):
                yield target.id, node.value
    elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        yield node.target.id, node.value


def class_values(one: SourceClass) -> Iterator[tuple[str, ast.expr | None]]:
    """The names that the body of a class assigns, and their values."""
    for node in statements(one.node.body):
        yield from assigned(node)


def dotted_name(node: ast.AST | None) -> str | None:
    """``a.b`` of such an expression, also of ``a.b[...]``; None for any other."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (owner := dotted_name(node.value)):
        return f"{owner}.{node.attr}"
    # Config[int] as a base.
    return dotted_name(node.value) if isinstance(node, ast.Subscript) else None


def _within(one: SourceClass, dotted: str) -> SourceClass | None:
    for name in dotted.split(".") if dotted else ():
        inner = [
            node
            for node in statements(one.node.body)
            if isinstance(node, ast.ClassDef) and node.name == name
        ]
        if not inner:
            return None
        one = SourceClass(one.module, inner[-1])
    return one
