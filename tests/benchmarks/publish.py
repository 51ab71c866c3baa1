"""Put what the benchmarks found into the documentation: tables between markers, and pictures.

    python tests/benchmarks/publish.py

In a page, ``<!-- found: NAME -->`` and ``<!-- end -->`` hold the table that `TABLES` makes of
``docs/performance/*.json``. ``nox -s bench`` does this at its end.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rounds import RESULTS

DOCS = RESULTS.parent
_BLOCK = re.compile(r"(<!-- found: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
_OURS, _OTHERS = "#4051b5", "#b8bcc8"
Found = Mapping[str, Any]


def main() -> None:
    found = read()
    for path in sorted(DOCS.rglob("*.md")):
        text = path.read_text(encoding="utf-8")
        if (published := with_tables(text, found)) != text:
            path.write_text(published, encoding="utf-8")
            print(path)
    for name, draw in PICTURES.items():
        draw(found, DOCS / "images" / f"{name}.png")


def read() -> dict[str, Found]:
    """What each benchmark found last, by its name."""
    return {path.stem: json.loads(path.read_text("utf-8")) for path in RESULTS.glob("*.json")}


def with_tables(text: str, found: Mapping[str, Found]) -> str:
    """A page with its tables made anew."""

    def made(match: re.Match[str]) -> str:
        return match[1] + "\n".join(TABLES[match[2]](found)) + "\n" + match[3]

    return _BLOCK.sub(made, text)


def names(text: str) -> list[str]:
    """Of the tables in a page."""
    return [match[2] for match in _BLOCK.finditer(text)]


# ---------------------------------------------------------------------- tables


def steps(found: Mapping[str, Found]) -> list[str]:
    """Microseconds above plain PyTorch, by tool and scenario."""
    scenarios = found["steps"]["values"]
    tools = list(next(iter(scenarios.values())))
    rows = [
        [_bold(tool), *(_number(of[tool]["above"]["median"], 0) for of in scenarios.values())]
        for tool in tools[1:]
    ]
    plain = [f"*{tools[0]}, in all*"]
    plain += [f"*{_number(of[tools[0]]['time']['median'], 0)}*" for of in scenarios.values()]
    return _table(["us a batch above plain PyTorch", *scenarios], [*rows, plain])


def saves(found: Mapping[str, Found]) -> list[str]:
    """Seconds of the call, of the stall and until committed, by way and size."""
    sizes = found["saves"]["values"]
    columns = ("call", "stall", "committed")
    head = [f"{size}: {what}, s" for size in sizes for what in columns]
    rows = [
        [
            _bold(way),
            *(_number(of[way][what]["median"]) for of in sizes.values() for what in columns),
        ]
        for way in next(iter(sizes.values()))
    ]
    return _table(["", *head], rows)


def targets(found: Mapping[str, Found]) -> list[str]:
    """What is promised, and what was found."""
    rows = []
    for name in ("steps", "saves", "throughput", "first_step", "sampler", "memory", "start_up"):
        for one in found[name]["targets"]:
            sign = ">=" if one["at_least"] else "<="
            spread = one["found"]
            quartiles = f"{_number(spread['low'])} to {_number(spread['high'])}"
            met = _number(spread["median"])
            met = f"**{met}**" if one["is_met"] else f"{met} (missed)"
            rows.append([one["name"], f"{sign} {one['limit']:g}", met, quartiles])
    return _table(["", "promised", "median", "quartiles"], rows)


def start_up(found: Mapping[str, Found]) -> list[str]:
    """How long programs take to answer."""
    return _spreads(found["start_up"]["values"], {"seconds": "s", "of_torch": "of `import torch`"})


def first_step(found: Mapping[str, Found]) -> list[str]:
    """From the start of a process to the end of its first step."""
    columns = {"seconds": "s", "of_fabric": "of Fabric by hand"}
    return _spreads(found["first_step"]["values"], columns)


def memory(found: Mapping[str, Found]) -> list[str]:
    """The most that a process held."""
    columns = {"mebibytes": "MiB", "states_above_plain": "above the plain loop, in states"}
    return _spreads(found["memory"]["values"], columns)


def sampler(found: Mapping[str, Found]) -> list[str]:
    """Time to a batch of a shuffled data set, and what it takes in memory."""
    seconds, sizes = found["sampler"]["values"].values()
    rows = [
        [name, _number(1e3 * one["median"]), _number(sizes[name]["median"])]
        for name, one in seconds.items()
    ]
    return _table(["", "ms", "MB"], rows)


def sample_seeding(found: Mapping[str, Found]) -> list[str]:
    """What seeding each sample costs."""
    columns = {"off": "us a sample without", "more": "more with it", "ratio": "ratio"}
    return _spreads(found["sample_seeding"]["values"], columns)


def machine(found: Mapping[str, Found]) -> list[str]:
    """Where the numbers are from."""
    kinds = {
        f"{one['processor']}, {one['cores']} cores, Python {one['python']}, torch {one['torch']}, "
        f"{one['date']}"
        for one in (of["machine"] for of in found.values())
    }
    return [f"Measured on: {'; '.join(sorted(kinds))}."]


TABLES: dict[str, Callable[[Mapping[str, Found]], list[str]]] = {
    one.__name__: one
    for one in (
        steps,
        saves,
        targets,
        start_up,
        first_step,
        memory,
        sampler,
        sample_seeding,
        machine,
    )
}


def _spreads(values: Found, columns: Mapping[str, str]) -> list[str]:
    rows = [
        [_bold(name), *(_number(of[key]["median"]) for key in columns)]
        for name, of in values.items()
    ]
    return _table(["", *columns.values()], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _bold(name: str) -> str:
    return f"**{name}**" if name.startswith("ours") else name


def _number(value: float, digits: int | None = None) -> str:
    """Three digits that count, or so many after the point."""
    if digits is None:
        digits = (
            0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 0.1 else 3
        )
    return f"{round(value, digits) + 0.0:,.{digits}f}"  # no -0


# ---------------------------------------------------------------------- pictures


def draw_steps(found: Mapping[str, Found], target: Path) -> None:
    """Bars above plain PyTorch, a panel for each scenario."""
    scenarios = found["steps"]["values"]
    tools = list(next(iter(scenarios.values())))[:0:-1]
    figure, axes = _panels(len(scenarios))
    for ax, (name, of) in zip(axes, scenarios.items(), strict=True):
        above = [of[tool]["above"] for tool in tools]
        medians = [max(one["median"], 0.0) for one in above]
        ax.barh(tools, medians, color=_colors(tools))
        for place, (median, one) in enumerate(zip(medians, above, strict=True)):
            ax.annotate(_number(one["median"], 0), (median, place), (3, 0), **_BESIDE)
        ax.set_title(name, fontsize=10)
        ax.set_xlim(0, max(medians) * 1.25)
    figure.supxlabel("microseconds a batch above plain PyTorch", fontsize=9)
    _save(figure, target)


def draw_saves(found: Mapping[str, Found], target: Path) -> None:
    """How long training stands still, and how long until all is on the disk."""
    sizes = found["saves"]["values"]
    ways = list(next(iter(sizes.values())))[::-1]
    figure, axes = _panels(len(sizes))
    for ax, (name, of) in zip(axes, sizes.items(), strict=True):
        committed = [of[way]["committed"]["median"] for way in ways]
        stalls = [of[way]["stall"]["median"] for way in ways]
        ax.barh(ways, committed, color="#e3e5ec")
        ax.barh(ways, stalls, height=0.5, color=_colors(ways))
        for place, (stall, until) in enumerate(zip(stalls, committed, strict=True)):
            ax.annotate(f"{stall:.2f}", (max(stall, until), place), (3, 0), **_BESIDE)
        ax.set_title(f"{name} of model and AdamW state", fontsize=10)
        ax.set_xlim(0, max([*committed, *stalls]) * 1.15)
    figure.supxlabel(
        "seconds: the training stands still (number), until committed (light)", fontsize=9
    )
    _save(figure, target)


PICTURES: dict[str, Callable[[Mapping[str, Found], Path], None]] = {
    "steps": draw_steps,
    "saves": draw_saves,
}
_BESIDE: Any = {"textcoords": "offset points", "va": "center", "fontsize": 8}


def _panels(count: int) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    size = (2.2 + 2.1 * count, 2.7) if count > 2 else (9.5, 2.7)
    figure, axes = plt.subplots(1, count, figsize=size, sharey=True, layout="constrained")
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=8)
    return figure, axes


def _colors(names: Sequence[str]) -> list[str]:
    return [_OURS if name.startswith("ours") else _OTHERS for name in names]


def _save(figure: Any, target: Path) -> None:
    from matplotlib import pyplot as plt

    # Without a date and a version in it the same numbers are the same file.
    figure.savefig(target, dpi=130, metadata={"Software": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
