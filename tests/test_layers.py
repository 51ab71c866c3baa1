"""Imports go one way only: read from the source, so that the offending line can be named."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = "dream_trainer"
ROOT = Path(__file__).parents[1] / "src" / PACKAGE

#: From top to bottom. A module imports from lower layers, or from its own name's family.
LAYERS = (
    ("__main__",),
    ("cli", "testing"),
    (
        "aside",
        "dropin",
        "inspection",
        "lightning_modules",
        "planning",
        "tuning",
        "verification",
    ),
    ("trainer.dream",),
    ("trainer.base",),
    ("trainer.abstract",),  # and every other part that the trainers are made of
    ("loop",),
    ("evaluation_loop",),
    ("callbacks",),
    ("reporting",),  # it needs no trainer, and trainers show what it draws
    ("loggers", "checkpointing", "data", "coordination", "predictions"),
    ("world",),
    ("storage",),
    (
        "configs",
        "progress",
        "accumulation",
        "measured",
        "metrics",
        "randomness",
        "reductions",
        "schedules",
    ),
    ("errors", "host_values", "lazy_names", "words"),
)
TRAINERS = ("trainer.dream", "trainer.base")
#: Doors: they only re-export what lies behind them.
DOORS = {"", "trainer"}
#: Fabric's own, named like one of ours: (module, attribute).
FOREIGN_PRIVATE = {("world.dream_world", "_callbacks"), ("world.direct", "_callbacks")}
NOT_A_CONCEPT = {"utils", "util", "helpers", "helper", "common", "misc", "tools", "shared"}


@dataclass(frozen=True)
class Import:
    """One imported name."""

    source: Path
    line: int
    module: str
    name: str | None

    @property
    def place(self) -> str:
        return f"src/{PACKAGE}/{self.source.relative_to(ROOT)}:{self.line}"


def sources() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def module_name(source: Path) -> str:
    """``trainer.base``; the package itself is the empty name."""
    parts = source.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source: Path, *, at_run_time: bool = True) -> list[Import]:
    tree = ast.parse(source.read_text(encoding="utf-8"))
    skipped = set(_under_type_checking(tree)) if at_run_time else set()
    found = []
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found += [Import(source, node.lineno, alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{source}:{node.lineno}: relative import"
            found += [
                Import(source, node.lineno, node.module or "", alias.name) for alias in node.names
            ]
    return found


def _under_type_checking(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for statement in node.body:
                yield from ast.walk(statement)


def own(one: Import) -> str | None:
    """The module of ours that an import loads, seen from the package; None for others."""
    head, _, rest = one.module.partition(".")
    if head != PACKAGE:
        return None
    if one.name is not None:
        target = ROOT.joinpath(*rest.split(".") if rest else (), one.name)
        if target.is_dir() or target.with_suffix(".py").is_file():
            return f"{rest}.{one.name}".lstrip(".")
    return rest


def unit(module: str) -> str:
    """What of a module's name the layers speak of."""
    head, _, rest = module.partition(".")
    if head != "trainer" or not rest:
        return head
    return module if module in TRAINERS else "trainer.abstract"


def layer(module: str) -> int:
    """Height of a module, 0 for the bottom."""
    return next(i for i, units in enumerate(reversed(LAYERS)) if unit(module) in units)


def test_every_module_has_its_place_in_the_layers() -> None:
    placed = {name for units in LAYERS for name in units}
    modules = {unit(module_name(source)) for source in sources()} - DOORS
    assert sorted(modules - placed) == [], "say in LAYERS where these belong"
    assert sorted(placed - modules) == [], "gone from src, or misspelled in LAYERS"


def test_imports_go_down_only() -> None:
    broken = []
    for source in sources():
        here = module_name(source)
        if here in DOORS:
            continue
        for one in imports(source):
            there = own(one)
            if there is None or unit(there) == unit(here):
                continue
            if there in DOORS or layer(there) > layer(here):
                broken.append(f"{one.place}: {here} imports {there or PACKAGE} from above")
    assert broken == [], "\n" + "\n".join(broken)


def test_neighbours_of_one_layer_do_not_form_a_circle() -> None:
    edges: dict[str, set[str]] = {}
    for source in sources():
        for one in imports(source):
            if (there := own(one)) and unit(there) != unit(module_name(source)):
                edges.setdefault(unit(module_name(source)), set()).add(unit(there))
    for door in DOORS:
        edges.pop(door, None)

    def reaches(start: str, goal: str, seen: frozenset[str] = frozenset()) -> bool:
        return any(
            one == goal or (one not in seen and reaches(one, goal, seen | {one}))
            for one in edges.get(start, ())
        )

    assert [name for name in edges if reaches(name, name)] == []


def test_only_world_imports_lightning() -> None:
    broken = [
        f"{one.place}: imports {one.module}"
        for source in sources()
        if unit(module_name(source)) != "world"
        for one in imports(source)
        if one.module.partition(".")[0] in ("lightning", "pytorch_lightning", "lightning_fabric")
    ]
    assert broken == [], "\n" + "\n".join(broken)


def test_lightning_is_named_outside_world_for_the_type_of_the_fabric_argument_only() -> None:
    named = {
        (one.module, one.name)
        for source in sources()
        if unit(module_name(source)) != "world"
        for one in imports(source, at_run_time=False)
        if one.module.startswith("lightning")
    }
    assert named <= {("lightning.fabric", "Fabric")}


def test_nobody_imports_a_private_name_of_ours() -> None:
    broken = [
        f"{one.place}: imports {one.module}.{one.name}"
        for source in sources()
        for one in imports(source, at_run_time=False)
        if one.module.partition(".")[0] == PACKAGE
        and any(
            part.startswith("_") and not part.endswith("__")
            for part in (*one.module.split("."), one.name or "")
        )
    ]
    assert broken == [], "\n" + "\n".join(broken)


def test_nobody_reads_an_attribute_that_another_module_keeps_private() -> None:
    trees = {source: ast.parse(source.read_text(encoding="utf-8")) for source in sources()}
    private_of = {source: set(_private_definitions(tree)) for source, tree in trees.items()}
    broken = []
    for source, tree in trees.items():
        elsewhere = set().union(*(names for other, names in private_of.items() if other != source))
        broken += [
            f"src/{PACKAGE}/{source.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute)
            and node.attr in elsewhere - private_of[source]
            and (module_name(source), node.attr) not in FOREIGN_PRIVATE
        ]
    assert broken == [], "\n" + "\n".join(broken)


def _private_definitions(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        name = None
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            name = node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            name = node.attr
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            name = node.id
        if name and name.startswith("_") and not name.endswith("__"):
            yield name


@pytest.mark.parametrize("source", sources(), ids=module_name)
def test_a_module_is_named_for_its_concept(source: Path) -> None:
    assert NOT_A_CONCEPT.isdisjoint(source.relative_to(ROOT).with_suffix("").parts)
