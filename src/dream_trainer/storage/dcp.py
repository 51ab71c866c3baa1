"""Trees to and from torch distributed checkpoints, without running code from them.

A checkpoint directory holds one DCP entry per tensor, named by its dotted path, and one byte
tensor ``__plain__`` with everything else, readable by ``torch.load(weights_only=True)``.
What differs between ranks is stored a second time around under ``__rank_<r>__``, because the
writer keeps only one of several entries with equal names.
"""

from __future__ import annotations

import functools
import io
import operator
import pickle
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.tensor import DTensor
from torch.futures import Future

from dream_trainer.errors import CheckpointError
from dream_trainer.storage.collective import Ranks
from dream_trainer.storage.counted import CountedFiles
from dream_trainer.storage.slices import WORTHWHILE_BYTES, FileView, read_slice
from dream_trainer.storage.tree import Tree, TreePath, join, merge, split

#: ``like(path, size)`` gives the tensor whose device and sharding a read one should have, or
#: None for a plain tensor in CPU memory.
Like = Callable[[TreePath, torch.Size], Tensor | None]

_ONE_PROCESS = "torch.distributed is disabled"  # is meant; torch warns at every call
_ALONE = Ranks()
_PLAIN = "__plain__"
_RESERVED = re.compile(r"__plain__$|__rank_\d+__")
_RANK_PLAIN = re.compile(r"__rank_(\d+)____plain__")
_METADATA_CLASSES = {
    *((dcp_metadata.__name__, name) for name in dcp_metadata.__all__),
    (dcp_metadata.__name__, "_MEM_FORMAT_ENCODING"),
    (filesystem.__name__, "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    *((module, "PosixPath") for module in ("pathlib", "pathlib._local")),
    *((module, "WindowsPath") for module in ("pathlib", "pathlib._local")),
}


def flatten(shared: Tree, local: Tree, *, rank: int = 0) -> dict[str, Tensor]:
    """What this rank writes of a state: entry name -> tensor, not copied.

    Args:
        shared: state that is sharded over the ranks (DTensors), or for which rank 0's counts.
        local: state of this rank alone.
        rank: this rank.

    Raises:
        TypeError: something is neither plain data nor a tensor.
    """
    entries = _entries(shared, "", with_plain=rank == 0)
    if rank != 0:
        # Of equal names the writer keeps any one rank's. What is not sharded has to be rank 0's:
        # batch norm's statistics differ between DDP ranks, and rank 0's count.
        entries = {name: value for name, value in entries.items() if isinstance(value, DTensor)}
    return entries | _entries(local, f"__rank_{rank}__")


def write_tree(
    directory: Path,
    entries: Mapping[str, Tensor],
    ranks: Ranks = _ALONE,
) -> dict[Path, int | None]:
    """Write a checkpoint; every rank takes part.

    Args:
        directory: where to; on a file system that all ranks see.
        entries: what `flatten` gave, or copies of it.
        ranks: who writes.

    Returns:
        The files that this rank wrote, and their CRC-32 where it is known.
    """
    writer = dcp.FileSystemWriter(directory, sync_files=True)
    writer.fs = files = CountedFiles()
    if ranks.size == 1:
        _write_alone(dict(entries), writer)
    else:
        dcp.save(dict(entries), storage_writer=writer, process_group=ranks.group)
    mine = [*directory.glob(f"__{ranks.rank}_*.distcp")]
    mine += [directory / ".metadata"] if ranks.rank == 0 else []
    return {path: files.crc32.get(path) for path in mine}


def _write_alone(entries: dict[str, Any], writer: dcp.FileSystemWriter) -> None:
    """What ``dcp.save`` does, without its warning that no other process takes part.

    To filter it in the writer's thread would meet the filters of the training's thread.
    """
    planner = dcp.DefaultSavePlanner()
    planner.set_up_planner(entries, writer.storage_meta(), is_coordinator=True)
    writer.set_up_storage_writer(is_coordinator=True)
    local = writer.prepare_local_plan(planner.create_local_plan())
    plans, metadata = planner.create_global_plan([local])
    plan = planner.finish_plan(writer.prepare_global_plan(plans)[0])
    results = writer.write_data(plan, planner).wait()
    writer.finish(metadata, [results])


def read_tree(directory: Path, like: Like | None = None, *, rank: int = 0) -> tuple[Tree, Tree]:
    """Read a checkpoint. No collective: each rank reads what it needs.

    Args:
        directory: the checkpoint.
        like: templates for device and sharding.
        rank: whose local part to read; rank 0's if the checkpoint has none for it.

    Returns:
        The shared part and the local part.

    Raises:
        CheckpointError: it is not readable, or holds something else than tensors.
    """
    with _opened(directory) as (reader, metadata):
        shared = _read(reader, metadata, "", like)
        prefix = f"__rank_{rank}__"
        is_there = prefix + _PLAIN in metadata.state_dict_metadata
        local = _read(reader, metadata, prefix if is_there else "__rank_0__", None)
    return shared, local


def read_outline(directory: Path) -> Tree:
    """The shared part of a checkpoint with its tensors on the meta device: shapes and types.

    Raises:
        CheckpointError: as `read_tree`.
    """
    with _opened(directory) as (reader, metadata):
        return _outline(reader, metadata, "")


def read_outlines(directory: Path) -> dict[int | None, Tree]:
    """Outlines of the shared part, under None, and of the part of each rank.

    Raises:
        CheckpointError: as `read_tree`.
    """
    with _opened(directory) as (reader, metadata):
        names = metadata.state_dict_metadata
        ranks = sorted(int(match[1]) for name in names if (match := _RANK_PLAIN.fullmatch(name)))
        return {None: _outline(reader, metadata, "")} | {
            rank: _outline(reader, metadata, f"__rank_{rank}__") for rank in ranks
        }


def read_tensors(
    directory: Path, places: Collection[tuple[int | None, TreePath]]
) -> dict[tuple[int | None, TreePath], Tensor]:
    """Single tensors, of the shared part (None) or of that of a rank, in CPU memory.

    Raises:
        CheckpointError: as `read_tree`.
    """
    names = {
        place: join(place[1]) if place[0] is None else f"__rank_{place[0]}__{join(place[1])}"
        for place in places
    }
    with _opened(directory) as (reader, metadata):
        tensors = _load(reader, metadata, dict.fromkeys(names.values()))
    return {place: tensors[name] for place, name in names.items()}


def _outline(reader: _SafeReader, metadata: Metadata, prefix: str) -> Tree:
    skeleton, paths = _plain_part(reader, metadata, prefix)
    entries = {path: _entry(metadata, name) for name, path in paths.items()}
    metas = {
        path: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
        for path, entry in entries.items()
    }
    return merge(skeleton, metas)


def read_parts(
    directory: Path,
    places: Collection[TreePath],
    like: Like | None = None,
    *,
    rank: int | None = None,
) -> dict[TreePath, Tree]:
    """What is at some places; the tensors elsewhere are not read.

    Args:
        directory: the checkpoint.
        places: of the shared part, or of that of a rank.
        like: templates for device and sharding.
        rank: whose part to read; None for the shared one.

    Raises:
        CheckpointError: as `read_tree`.
        KeyError: there is no such place.
    """
    wanted = set(places)
    with _opened(directory) as (reader, metadata):
        prefix = "" if rank is None else f"__rank_{rank}__"
        skeleton, paths = _plain_part(reader, metadata, prefix)
        chosen = {
            name: path
            for name, path in paths.items()
            if any(path[:length] in wanted for length in range(len(path) + 1))
        }
        tensors = _load(reader, metadata, _templates(metadata, chosen, like))
    tree = merge(skeleton, {path: tensors[name] for name, path in chosen.items()})
    return {place: functools.reduce(operator.getitem, place, tree) for place in places}


@contextmanager
def _opened(directory: Path) -> Iterator[tuple[_SafeReader, Metadata]]:
    """The index of a checkpoint of ours; whatever goes wrong with it is a `CheckpointError`."""
    reader = _SafeReader(directory)
    try:
        metadata = reader.read_metadata()
        names = metadata.state_dict_metadata
        pickled = [n for n, m in names.items() if not isinstance(m, TensorStorageMetadata)]
        if pickled:
            raise CheckpointError(
                str(directory),
                [f"{name} is a pickle, which can run code" for name in pickled],
                "Only load it with the program that wrote it, if you trust its source.",
            )
        if _PLAIN not in names:
            raise CheckpointError(
                str(directory),
                ["it was not written by dream_trainer"],
                "Give the path of a checkpoint directory that a run or DreamWorld.save wrote.",
            )
        yield reader, metadata
    except CheckpointError:
        raise
    except (Exception, CheckpointException) as error:  # the latter is a BaseException
        raise CheckpointError(str(directory), [f"{type(error).__name__}: {error}"]) from error


def _entries(tree: Tree, prefix: str, *, with_plain: bool = True) -> dict[str, Tensor]:
    skeleton, tensors = split(tree)
    paths = {prefix + join(path): path for path in tensors}
    if len(paths) != len(tensors):
        raise ValueError("two tensors of the state have the same dotted name")
    if not prefix and (ours := [name for name in paths if _RESERVED.match(name)]):
        raise ValueError(f"the name {ours[0]} is taken by the format")
    entries = {name: tensors[path].detach() for name, path in paths.items()}
    if with_plain:
        buffer = io.BytesIO()
        torch.save({"skeleton": skeleton, "tensors": paths}, buffer)
        entries[prefix + _PLAIN] = torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)
    return entries


def _read(reader: _SafeReader, metadata: Metadata, prefix: str, like: Like | None) -> Tree:
    skeleton, paths = _plain_part(reader, metadata, prefix)
    tensors = _load(reader, metadata, _templates(metadata, paths, like))
    return merge(skeleton, {path: tensors[name] for name, path in paths.items()})


def _plain_part(
    reader: _SafeReader, metadata: Metadata, prefix: str
) -> tuple[Tree, dict[str, TreePath]]:
    """What is no tensor, and the paths of the tensors by the names of their entries."""
    plain = _load(reader, metadata, {prefix + _PLAIN: None})[prefix + _PLAIN]
    content = torch.load(io.BytesIO(plain.numpy().tobytes()), weights_only=True)
    return content["skeleton"], content["tensors"]


def _templates(
    metadata: Metadata, paths: Mapping[str, TreePath], like: Like | None
) -> dict[str, Tensor | None]:
    sizes = {name: _entry(metadata, name).size for name in paths}
    return {name: like(path, sizes[name]) if like else None for name, path in paths.items()}


def _load(
    reader: _SafeReader, metadata: Metadata, templates: dict[str, Tensor | None]
) -> dict[str, Tensor]:
    targets: dict[str, Any] = {}
    for name, template in templates.items():
        entry = _entry(metadata, name)
        if template is None:
            targets[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
        else:
            targets[name] = torch.empty_like(template, dtype=entry.properties.dtype)
    if targets:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=_ONE_PROCESS)
            dcp.load(targets, storage_reader=reader, no_dist=True)
    return targets


def _entry(metadata: Metadata, name: str) -> TensorStorageMetadata:
    return cast(TensorStorageMetadata, metadata.state_dict_metadata[name])


class _SafeReader(dcp.FileSystemReader):
    """Reads ``.metadata`` with an unpickler that knows only the metadata classes.

    The reader it derives from unpickles whatever the file says, so a stranger's checkpoint
    could run code. It also reads the whole of a tensor of which a part is wanted.
    """

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        left = [item for item in plan.items if not self._read_slice(item, planner)]
        return super().read_data(replace(plan, items=left), planner)

    def _read_slice(self, item: ReadItem, planner: LoadPlanner) -> bool:
        """Whether a request is for a part of a large tensor, and was answered."""
        info = self.storage_data[item.storage_index]
        target = planner.resolve_tensor(item).detach()
        is_part = info.length > target.nbytes + WORTHWHILE_BYTES
        # What was compressed, say; torch has known of that since 2.8.
        if not is_part or getattr(info, "transform_descriptors", None):
            return False
        with (Path(self.path) / info.relative_path).open("rb") as stream:
            saved = FileView(stream, info.offset, info.length)
            if not read_slice(saved, item.storage_offsets, target):
                return False
        planner.commit_tensor(item, target)
        return True

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata = cast(Metadata, _MetadataUnpickler(file).load())
        if metadata.storage_meta is not None:
            metadata.storage_meta.load_id = self.load_id
        return metadata


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in _METADATA_CLASSES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f".metadata asks for {module}.{name}, which is not allowed")
