"""Configuration files: YAML with its lines, base files, and one file laid over another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dream_trainer.configs.yaml_text import ConfigLoader
from dream_trainer.errors import ConfigError

#: The key under which a file names the files that it is laid over.
BASE = "_base_"
#: Aliases inside aliases make a few lines of YAML as long as memory allows.
_MOST_VALUES = 100_000


@dataclass
class Given:
    """What files set.

    Args:
        content: values, nested by name.
        places: file and line of each value, by dotted name.
    """

    content: dict[str, Any] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)

    def over(self, below: Given) -> Given:
        """This over another: mappings merge, of two values this one's counts."""
        content = _merge(below.content, self.content)
        return Given(content, {**below.places, **self.places})

    def under(self, name: str) -> Given:
        """The same one level deeper."""
        places = {f"{name}.{key}": place for key, place in self.places.items()}
        return Given({name: self.content}, places)

    def without(self, path: Sequence[Any]) -> Given:
        """A copy without the value at a path, and without what is empty then."""
        return Given(_without(self.content, list(path)), self.places)

    def paths(self, name: str) -> Iterator[tuple[Any, ...]]:
        """Paths of the values at and below a dotted name, the deepest first."""
        value: Any = self.content
        path: list[Any] = []
        for part in name.split("."):
            if not isinstance(value, Mapping) or part not in value:
                break
            value = value[part]
            path.append(part)
        if path:
            yield from _paths(value, tuple(path))

    def value(self, path: Sequence[Any]) -> Any:
        """The value at a path."""
        found: Any = self.content
        for part in path:
            found = found[part]
        return found

    def place(self, path: Sequence[Any]) -> str:
        """File and line of a path, or of the nearest one above it."""
        names = [str(part) for part in path]
        above = (".".join(names[:n]) for n in range(len(names), 0, -1))
        return next((self.places[name] for name in above if name in self.places), "")


def read_file(path: str, sections: Set[str]) -> Given:
    """What a file sets, over what its base files set.

    Args:
        path: of the file. ``_base_`` in it is the path of a file that it is laid over, or a list
            of them, seen from its folder.
        sections: dotted names for which the name of another file may stand.

    Raises:
        ConfigError: naming the file, and the line where there is one.
    """
    return _read(path, sections, ())


def read_section(path: str, name: str, sections: Set[str]) -> Given:
    """A file with the values of one section.

    Args:
        path: of the file.
        name: dotted name of the section.
        sections: as for `read_file`, seen from the top.

    Raises:
        ConfigError: as `read_file`.
    """
    inner = {one.removeprefix(f"{name}.") for one in sections if one.startswith(f"{name}.")}
    found = _read(path, inner, ())
    for part in reversed(name.split(".")):
        found = found.under(part)
    return found


def _read(path: str, sections: Set[str], readers: tuple[str, ...]) -> Given:
    where = str(Path(path).resolve())
    if where in readers:
        raise ConfigError(path, [f"is one of its own base files, by way of {readers[-1]}"])
    own = _load(path)
    bases = own.content.pop(BASE, [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(one, str) for one in bases):
        raise ConfigError(
            own.places[BASE], [f"{BASE} is neither the path of a file nor a list of them"]
        )
    found = Given()
    for base in bases:
        try:
            below = _read(_from(path, base), sections, (*readers, where))
        except ConfigError as error:
            raise ConfigError(f"{own.places[BASE]}: {error.place}", error.problems) from None
        found = below.over(found)
    for name in sections:
        parts = name.split(".")
        holder: Any = own.content
        for part in parts[:-1]:
            holder = holder.get(part) if isinstance(holder, dict) else None
        if isinstance(holder, dict) and isinstance(section := holder.get(parts[-1]), str):
            del holder[parts[-1]]
            try:
                own = own.over(read_section(_from(path, section), name, sections))
            except ConfigError as error:
                raise ConfigError(f"{own.places[name]}: {error.place}", error.problems) from None
    return own.over(found)


def _from(path: str, other: str) -> str:
    """A path that a file names, as seen from here."""
    return str(Path(path).parent / Path(other).expanduser())


def _load(path: str) -> Given:
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
        loader = ConfigLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return Given()
            places = _places(node, path)
            content = loader.construct_document(node)
        finally:
            loader.dispose()
    except FileNotFoundError:
        raise ConfigError(path, ["there is no such file"]) from None
    except OSError as error:
        raise ConfigError(path, [f"cannot be read ({error.strerror})"]) from None
    except UnicodeDecodeError:
        raise ConfigError(path, ["is not a text file in UTF-8"]) from None
    except yaml.YAMLError as error:
        raise _broken(path, error) from None
    except RecursionError:
        raise ConfigError(path, ["is nested too deeply"]) from None
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(path, [f"is not a configuration ({error})"]) from None
    if content is None:
        return Given()
    if not isinstance(content, dict):
        raise ConfigError(path, ["is not a mapping of option names to values"])
    odd = [f"{key!r} is no option name" for key in content if not isinstance(key, str)]
    if odd:
        raise ConfigError(path, odd)
    return Given(content, places)


def _broken(path: str, error: yaml.YAMLError) -> ConfigError:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
    place = f"{path}:{mark.line + 1}" if mark else path
    column = f", column {mark.column + 1}" if mark else ""
    return ConfigError(place, [f"broken YAML{column}: {problem}"])


def _places(root: yaml.Node, path: str) -> dict[str, str]:
    """Place of every key of a document, by dotted name.

    Raises:
        ConfigError: a key stands twice, or the document contains itself or is too long.
    """
    places: dict[str, str] = {}
    problems: list[str] = []
    seen = 0

    def walk(node: yaml.Node, name: str, above: tuple[int, ...]) -> None:
        nonlocal seen
        seen += 1
        line = node.start_mark.line + 1
        if seen > _MOST_VALUES:
            raise ConfigError(path, [f"has more than {_MOST_VALUES} values, aliases resolved"])
        if id(node) in above:
            raise ConfigError(f"{path}:{line}", [f"{name or 'the document'} contains itself"])
        above = (*above, id(node))
        if isinstance(node, yaml.SequenceNode):
            for position, one in enumerate(node.value):
                walk(one, f"{name}.{position}".lstrip("."), above)
        if not isinstance(node, yaml.MappingNode):
            return
        first: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            text = key.value if isinstance(key, yaml.ScalarNode) else "a mapping or list"
            dotted = f"{name}.{text}" if name else str(text)
            if text in first and text != "<<":
                problems.append(f"{dotted} stands twice, in lines {first[text]} and {line}")
            first.setdefault(str(text), line)
            places.setdefault(dotted, f"{path}:{line}")
            walk(value, dotted, above)

    walk(root, "", ())
    if problems:
        raise ConfigError(path, problems)
    return places


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
    return not same_class(old, new)


def same_class(one: str, other: str) -> bool:
    """Whether two names are of one class: in full, or by its last part."""
    return one == other or one.endswith(f".{other}") or other.endswith(f".{one}")


def _without(content: Mapping[Any, Any], path: list[Any]) -> dict[Any, Any]:
    first, *rest = path
    kept = dict(content)
    if rest and isinstance(kept.get(first), Mapping):
        kept[first] = _without(kept[first], rest)
        if kept[first]:
            return kept
    kept.pop(first, None)
    return kept


def _paths(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, Mapping):
        for key, entry in value.items():
            # A class without its name is no smaller mistake.
            if key != "class_path":
                yield from _paths(entry, (*path, key))
    yield path
