"""Fields of dataclasses and arguments of classes as options, read from their source."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field

from dream_trainer.cli.source_classes import (
    Alias,
    SourceClass,
    SourceModule,
    Sources,
    class_values,
    dotted_name,
    statements,
)

_DTYPES = ("bfloat16", "float16", "float32", "float64", "int32", "int64", "uint8", "bool")
_WORDS = {"bool": ("true", "false"), "torch.dtype": _DTYPES}
_ANY_TEXT = {"str", "typing.Any", "pathlib.Path", "os.PathLike"}
_NO_WORDS = {"int", "float", "complex", "bytes", "datetime.timedelta"}
_NO_WORDS |= {f"dream_trainer.configs.quantities.{name}" for name in ("Duration", "Size")}
_MAPPINGS = {"dict", "typing.Dict", "collections.abc.Mapping", "typing.Mapping"}
_SEQUENCES = {"list", "tuple", "set", "collections.abc.Sequence", "typing.List", "typing.Sequence"}


@dataclass
class Values:
    """What may be given to an option.

    Args:
        words: values that can be listed.
        text: whether any text will do, a path for example.
        section: the dataclass whose fields are options below this one.
        bases: classes of which a subclass is named.
        entries: what the values of a mapping may be; None if it is no mapping.
    """

    words: list[str] = field(default_factory=list)
    text: bool = False
    section: SourceClass | None = None
    bases: list[SourceClass | str] = field(default_factory=list)
    entries: Values | None = None

    @property
    def is_section(self) -> bool:
        """Whether there are options below, whatever is given."""
        return self.section is not None or self.entries is not None

    def add(self, other: Values) -> None:
        """Allow also what another one allows."""
        self.words += other.words
        self.text |= other.text
        self.section = self.section or other.section
        self.bases += other.bases
        self.entries = self.entries or other.entries


@dataclass
class Option:
    """An option as it is written in the source.

    Args:
        name: its last part.
        values: what may be given.
        help: the first line under the field.
        default: the expression that gives the default, and its module.
    """

    name: str
    values: Values
    help: str = ""
    default: Alias | None = None


class FieldReader:
    """Reads what a class takes.

    Args:
        sources: finds what annotations name.
    """

    def __init__(self, sources: Sources) -> None:
        self._sources = sources

    def fields(self, one: SourceClass) -> dict[str, Option]:
        """The fields of a dataclass, the inherited ones first."""
        found: dict[str, Option] = {}
        for owner in reversed(list(self._sources.opened_lineage(one))):
            body = list(statements(owner.node.body))
            for node, after in zip(body, [*body[1:], None], strict=True):
                if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
                    continue
                name = node.target.id
                kind = dotted_name(node.annotation)
                if name.startswith("_") or (kind or "").rpartition(".")[2] in (
                    "ClassVar",
                    "KW_ONLY",
                ):
                    continue
                if _keyword(node.value, "init", False):
                    found.pop(name, None)
                    continue
                default = _made(node.value)
                found[name] = Option(
                    name,
                    self.values(owner.module, node.annotation),
                    _text_of(after) or (found[name].help if name in found else ""),
                    Alias(owner.module, default) if default is not None else None,
                )
        return found

    def arguments(self, one: SourceClass) -> list[Option]:
        """The arguments that a class is made with."""
        found: dict[str, Option] = {}
        for owner in self._sources.opened_lineage(one):
            if self._is_dataclass(owner):
                return [*found.values(), *self.fields(owner).values()]
            init = next(
                (
                    node
                    for node in owner.node.body
                    if isinstance(node, ast.FunctionDef) and node.name == "__init__"
                ),
                None,
            )
            if init is None:
                continue
            for argument in [*init.args.posonlyargs, *init.args.args, *init.args.kwonlyargs][1:]:
                values = self.values(owner.module, argument.annotation)
                found.setdefault(argument.arg, Option(argument.arg, values))
            if init.args.kwarg is None:
                break
        return list(found.values())

    def _is_dataclass(self, one: SourceClass) -> bool:
        for decorator in one.node.decorator_list:
            called = decorator.func if isinstance(decorator, ast.Call) else decorator
            name = dotted_name(called)
            if name and self._sources.meaning(one.module, name) == "dataclasses.dataclass":
                return True
        return False

    def values(self, module: SourceModule, node: ast.AST | None) -> Values:
        if isinstance(node, ast.Constant):
            if isinstance(node.value, str):
                return self.values(module, _parsed(node.value))
            return Values(words=["null"] if node.value is None else [])
        if isinstance(node, ast.BinOp):
            return self._any_of(module, [node.left, node.right])
        if isinstance(node, ast.Subscript):
            return self._of_subscript(module, node)
        name = dotted_name(node)
        found = self._sources.meaning(module, name) if name else ""
        if isinstance(found, Alias):
            return self.values(found.module, found.node)
        if isinstance(found, str):
            return _of_name(found)
        return self._of_class(found)

    def _of_class(self, one: SourceClass) -> Values:
        if one.name in _NO_WORDS:
            return Values()
        line = list(self._sources.lineage(one))
        if any(isinstance(base, str) and base.startswith("enum.") for base in line):
            return Values(words=[name for name, _ in class_values(one) if name[0] != "_"])
        if any(isinstance(base, SourceClass) and self._is_dataclass(base) for base in line):
            return Values(section=one)
        return Values(bases=[one])

    def _of_subscript(self, module: SourceModule, node: ast.Subscript) -> Values:
        name = dotted_name(node.value)
        outer = self._sources.meaning(module, name) if name else ""
        inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        if not isinstance(outer, str):
            return self.values(module, node.value)
        if outer in _MAPPINGS:
            return Values(entries=self.values(module, inner[-1]))
        match outer.rpartition(".")[2]:
            case "Literal":
                values = (one.value for one in inner if isinstance(one, ast.Constant))
                return Values(words=[_written(value) for value in values])
            case "Optional":
                return self._any_of(module, [*inner, ast.Constant(None)])
            case "Union":
                return self._any_of(module, inner)
            case "Annotated" | "Final" | "InitVar" | "ClassVar" | "Required":
                return self.values(module, inner[0])
        return _of_name(outer)

    def _any_of(self, module: SourceModule, nodes: list[ast.expr]) -> Values:
        found = Values()
        for node in nodes:
            found.add(self.values(module, node))
        return found


def _of_name(name: str) -> Values:
    if name in _WORDS:
        return Values(words=list(_WORDS[name]))
    if name in _MAPPINGS:
        return Values(entries=Values(text=True))
    if name in _NO_WORDS | _SEQUENCES:
        return Values()
    # A dotted name is of a package that is not opened: it is a class, or any text will do.
    is_class = "." in name and name.rpartition(".")[2][:1].isupper() and name not in _ANY_TEXT
    return Values(bases=[name]) if is_class else Values(text=True)


def _made(default: ast.expr | None) -> ast.expr | None:
    """What ``field(default=...)`` and ``field(default_factory=...)`` make."""
    if not isinstance(default, ast.Call) or (dotted_name(default.func) or "")[-5:] != "field":
        return default
    for keyword in default.keywords:
        if keyword.arg in ("default", "default_factory"):
            made = keyword.value
            return made.body if isinstance(made, ast.Lambda) else made
    return None


def _keyword(node: ast.expr | None, name: str, value: object) -> bool:
    return isinstance(node, ast.Call) and any(
        one.arg == name and isinstance(one.value, ast.Constant) and one.value.value is value
        for one in node.keywords
    )


def _text_of(node: ast.stmt | None) -> str:
    if not isinstance(node, ast.Expr) or not isinstance(node.value, ast.Constant):
        return ""
    text = node.value.value
    return text.strip().partition("\n")[0] if isinstance(text, str) else ""


def _parsed(text: str) -> ast.expr | None:
    try:
        return ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError):
        return None


def _written(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)
