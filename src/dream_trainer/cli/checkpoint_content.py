"""``checkpoints show`` and ``diff``: what is in a checkpoint, and how two differ."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dream_trainer.checkpointing import StoredCheckpoint
from dream_trainer.checkpointing.inventory import ListedCheckpoint
from dream_trainer.checkpointing.places import find_checkpoint, run_of
from dream_trainer.cli.tables import moment, number, print_heading, print_table
from dream_trainer.configs.differing import ABSENT, differing
from dream_trainer.errors import CheckpointError, ConfigError
from dream_trainer.storage import Manifest
from dream_trainer.storage.sizes import size
from dream_trainer.words import counted

if TYPE_CHECKING:
    from dream_trainer.checkpointing.contents import Part
    from dream_trainer.checkpointing.difference import PartDifference, StateDifference

_MOST_LINES = 20
_ALL = ("manifest", "config", "state")


def show(given: argparse.Namespace) -> None:
    """Print manifest and contents of a checkpoint."""
    found = find_checkpoint(Path(given.checkpoint))
    if found.manifest is None:
        raise CheckpointError(str(found.path), found.problems)
    # Here, because it loads torch: a wrong path is told at once.
    from dream_trainer.checkpointing.contents import contents

    inside = contents(found.path)
    if given.json:
        about = found.as_dict() | {
            "versions": dict(found.manifest.versions),
            "format_version": found.manifest.format_version,
            "files": {name: dict(record) for name, record in found.manifest.files.items()},
            "contents": inside.as_dict(),
        }
        print(json.dumps(about, indent=2))
        return
    _print_manifest(found, found.manifest)
    shown, others = _shown(inside.parts)
    rows = [row for part in shown for row in _rows(part, 0, given.depth)]
    if others:
        rows.append(_sum_of_ranks(others))
    total = ("in all", "", "", f"{inside.num_tensors:,}", size(inside.num_bytes))
    columns = ("Part", "Type", "Shape or value", "Tensors", "Bytes")
    print_table(columns, [*rows, total], ("Tensors", "Bytes"))


def _print_manifest(found: ListedCheckpoint, manifest: Manifest) -> None:
    print_heading(str(found.path))
    print(
        f"step {manifest.step}, epoch {manifest.epoch}, saved {moment(manifest.saved_at)} UTC "
        f"by {counted(manifest.world_size, 'rank')}"
    )
    if manifest.monitor is not None:
        print(f"{manifest.monitor} {number(manifest.monitored)}")
    if manifest.versions:
        print(", ".join(f"{name} {version}" for name, version in manifest.versions.items()))
    files = f"{counted(len(manifest.files), 'file')}, {size(manifest.num_bytes)}"
    print(f"{files}: {'; '.join(found.problems) or 'whole by their sizes'}\n")


def _shown(parts: Sequence[Part]) -> tuple[list[Part], list[Part]]:
    """What is shown, and the parts of all ranks but the first."""
    ranks = [part for part in parts if part.name.startswith("rank ")]
    return [part for part in parts if part not in ranks[1:]], ranks[1:]


def _sum_of_ranks(ranks: Sequence[Part]) -> tuple[str, ...]:
    names = ranks[0].name if len(ranks) == 1 else f"{ranks[0].name} to {ranks[-1].name[5:]}"
    tensors = sum(one.num_tensors for one in ranks)
    return names, "", "not listed", f"{tensors:,}", size(sum(one.num_bytes for one in ranks))


def _rows(part: Part, level: int, depth: int | None) -> Iterator[tuple[str, ...]]:
    name = "  " * level + part.name
    dtypes = ", ".join(part.dtypes)
    if part.shape is not None:
        yield name, dtypes, str(tuple(part.shape)), "", size(part.num_bytes)
    elif not part.parts:
        yield name, "", part.text, "", ""
    else:
        tensors = f"{part.num_tensors:,}" if part.num_tensors else ""
        is_cut = depth is not None and level + 1 >= depth
        more = f"{counted(len(part.parts), 'entry')}".replace("entrys", "entries") if is_cut else ""
        yield name, dtypes, more, tensors, size(part.num_bytes) if part.num_tensors else ""
        if not is_cut:
            for one in part.parts:
                yield from _rows(one, level + 1, depth)


def diff(given: argparse.Namespace) -> int:
    """Compare two checkpoints.

    Returns:
        0 if nothing differs, 1 if something does.
    """
    try:
        return _diff(given)
    except CheckpointError as error:
        # 1 would say that they differ.
        raise ConfigError(error.place, error.problems, error.next_move) from error


def _diff(given: argparse.Namespace) -> int:
    one, other = (_whole(Path(place)) for place in (given.one, given.other))
    from dream_trainer.checkpointing.difference import compare_manifests, compare_states

    what = given.only or _ALL
    found: dict[str, Any] = {"one": str(one.path), "other": str(other.path)}
    is_same = True
    if "manifest" in what:
        found["manifest"] = compare_manifests(one.manifest, other.manifest)
        is_same &= not found["manifest"]
    if "config" in what:
        found["config"] = _compare_configs(one.path, other.path)
        is_same &= not found["config"]
    if "state" in what:
        state = compare_states(one.path, other.path)
        found["state"] = state
        is_same &= state.is_same
    if given.json:
        plain = found | ({"state": state.as_dict()} if "state" in what else {})
        print(json.dumps({"same": is_same} | plain, indent=2, default=lambda absent: None))
    else:
        _print_difference(found)
    return 0 if is_same else 1


def _whole(place: Path) -> StoredCheckpoint:
    """The checkpoint at a path, with checksums that are right."""
    found = find_checkpoint(place)
    problems = found.manifest.problems(found.path) if found.manifest else found.problems
    if found.manifest is None or problems:
        raise CheckpointError(
            str(found.path), problems, "It is damaged; 'checkpoints ls' lists others."
        )
    return StoredCheckpoint(found.path, found.manifest)


def _compare_configs(one: Path, other: Path) -> dict[str, list[Any]] | None:
    """None if one of the runs has no configuration that can be read."""
    configs = [run_of(path).config for path in (one, other)]
    return None if None in configs else differing(configs)


def _print_difference(found: Mapping[str, Any]) -> None:
    print(f"A {found['one']}\nB {found['other']}")
    if "manifest" in found:
        _print_pairs("manifest", found["manifest"])
    if "config" in found:
        if found["config"] is None:
            print("config: not compared, as there is no config.yaml for both")
        else:
            _print_pairs("config", found["config"])
    if "state" in found:
        _print_state(found["state"])


def _print_state(state: StateDifference) -> None:
    for name, places in (("A", state.only_in_one), ("B", state.only_in_other)):
        if places:
            print(f"\nonly in {name}: {len(places):,}")
            _print_lines([f"  {place}" for place in places])
    for name, pairs in (("shapes", state.shapes), ("types", state.dtypes)):
        if pairs:
            _print_pairs(name, pairs)
    _print_pairs("values that are no tensors", state.plain)
    num_tensors = sum(part.num_tensors for part in state.parts)
    num_differing = sum(part.num_differing for part in state.parts)
    if not num_differing:
        print(f"tensors: all {num_tensors:,} that are in both are bitwise equal")
        return
    print(f"\ntensors: {num_differing:,} of {num_tensors:,} that are in both differ")
    columns = ("Part", "Tensors", "Differ", "Largest difference", "In")
    print_table(columns, [_row(part) for part in state.parts], columns[1:4])


def _row(part: PartDifference) -> tuple[str, ...]:
    if not part.num_differing:
        return part.part, f"{part.num_tensors:,}", "0", "bitwise equal", ""
    largest = f"{part.largest:.6g}"
    return part.part, f"{part.num_tensors:,}", f"{part.num_differing:,}", largest, part.largest_in


def _print_pairs(name: str, pairs: Mapping[str, Sequence[Any]]) -> None:
    if not pairs:
        print(f"{name}: the same")
        return
    print(f"\n{name}: {counted(len(pairs), 'difference')}")
    rows = [(f"  {place}", _told(one), _told(other)) for place, (one, other) in pairs.items()]
    print_table(("  Name", "A", "B"), rows[:_MOST_LINES])
    _print_rest(len(rows))


def _print_lines(lines: Sequence[str]) -> None:
    print("\n".join(lines[:_MOST_LINES]))
    _print_rest(len(lines))


def _print_rest(num_lines: int) -> None:
    if num_lines > _MOST_LINES:
        print(f"  and {num_lines - _MOST_LINES:,} more; --json has all")


def _told(value: Any) -> str:
    if value is ABSENT or isinstance(value, str):
        return str(value)
    return json.dumps(value)
