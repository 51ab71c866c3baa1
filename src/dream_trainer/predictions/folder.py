"""A folder of predictions: whole or absent, whatever happened while it was written.

``manifest.json`` says what is there, ``rank-0000/batch-00000000.pt`` holds what one rank predicted
and the samples it is of. Under way it is ``.NAME.partial``, which a new start throws away.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

import torch

from dream_trainer.errors import ConfigError
from dream_trainer.predictions.samples import sample_of, together
from dream_trainer.storage import write_text
from dream_trainer.storage.atomic import fsync_directory, fsync_file

_FORMAT = 1
_MANIFEST = "predictions.json"

Order = Literal["index", "read", "rank"]
"""By the index in the data set; as they were read over all ranks; rank after rank."""


@dataclass(frozen=True)
class Batch:
    """What one rank predicted for one batch."""

    number: int
    """Index of the batch on the rank."""
    indices: list[int] | None
    """In the data set, sample by sample; None if they are not known."""
    num_samples: int
    result: Any
    """Of all samples, or, if it is not split, of the one there is."""
    is_split: bool = True


def partial(folder: Path) -> Path:
    """Where a folder is until it is whole."""
    return folder.with_name(f".{folder.name}.partial")


def _replaced(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.replaced")


def begin(folder: Path, *, overwrite: bool) -> None:
    """Make room for new predictions. On rank 0.

    Raises:
        ConfigError: the folder is there already, or cannot be made.
    """
    if (replaced := _replaced(folder)).exists() and not folder.exists():
        replaced.rename(folder)  # killed between two renamings
    if folder.exists() and not overwrite:
        raise ConfigError(
            str(folder), ["is there already"], "Choose another folder, or overwrite=True."
        )
    if folder.exists() and not (folder / _MANIFEST).is_file():
        raise ConfigError(str(folder), ["holds no predictions, so it is not written over"])
    try:
        # Of a start that was killed: half of it would be mixed with the new ones.
        shutil.rmtree(partial(folder), ignore_errors=True)
        partial(folder).mkdir(parents=True)
    except OSError as error:
        raise ConfigError(str(folder), [f"cannot be written: {error}"]) from error


def write(folder: Path, rank: int, batches: Sequence[Batch]) -> None:
    """Write batches of one rank to one file, named by the first."""
    place = partial(folder) / f"rank-{rank:04d}"
    place.mkdir(exist_ok=True)
    path = place / f"batch-{batches[0].number:08d}.pt"
    torch.save([vars(one) for one in batches], path)
    fsync_file(path)


def finish(folder: Path, order: Order, num_files: Sequence[int], num_samples: int) -> None:
    """Give a folder its name, now that every rank has written all. On rank 0.

    Args:
        folder: its name.
        order: of the samples when they are read.
        num_files: that each rank has written.
        num_samples: over all ranks.

    Raises:
        ConfigError: a rank has written where this one does not see it.
    """
    beside = partial(folder)
    files = sorted(beside.glob("rank-*/*.pt"))
    if len(files) != sum(num_files):
        raise ConfigError(
            str(folder),
            [f"the ranks wrote {sum(num_files)} files, and rank 0 sees {len(files)}"],
            "Choose a folder on a file system that all ranks share.",
        )
    manifest = {
        "format": _FORMAT,
        "order": order,
        "num_samples": num_samples,
        "files": {path.relative_to(beside).as_posix(): path.stat().st_size for path in files},
    }
    write_text(beside / _MANIFEST, json.dumps(manifest, indent=1) + "\n")
    if folder.exists():  # asked for; whole, until the new one is
        replaced = _replaced(folder)
        shutil.rmtree(replaced, ignore_errors=True)
        folder.rename(replaced)
        beside.rename(folder)
        shutil.rmtree(replaced)
    else:
        beside.rename(folder)
    fsync_directory(folder.parent)


class Predictions(Sequence[Any]):
    """Predictions by sample, in the order of the data.

    Args:
        batches: rank and batch, as they were written.
        order: of the samples.

    Attributes:
        indices: in the data set, sample by sample; None if they are not known.
    """

    def __init__(self, batches: Sequence[tuple[int, Batch]], order: Order) -> None:
        in_turn = {
            "index": lambda of_rank: (of_rank[1].number, of_rank[0]),
            "read": lambda of_rank: (of_rank[1].number, of_rank[0]),
            "rank": lambda of_rank: (of_rank[0], of_rank[1].number),
        }
        ordered = [batch for _, batch in sorted(batches, key=in_turn[order])]
        self._places = [(batch, row) for batch in ordered for row in range(batch.num_samples)]
        self.indices: Sequence[Any] | None = None
        if order == "index":
            first: dict[int, tuple[Batch, int]] = {}
            for batch, row in self._places:
                assert batch.indices is not None
                first.setdefault(batch.indices[row], (batch, row))
            self.indices = sorted(first)
            self._places = [first[index] for index in self.indices]

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        batch, row = self._places[index]
        return sample_of(batch.result, row) if batch.is_split else batch.result

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))

    def together(self) -> Any:
        """All as one batch: tensors of one shape stacked, all else lists, in their structure."""
        return together(list(self))


def read_predictions(folder: str | Path) -> Predictions:
    """Read what a `PredictionWriter` has written, on any number of ranks.

    Nothing in it is executed. It is read into memory as a whole.

    Args:
        folder: that the writer was given.

    Returns:
        A sequence with an entry a sample, in the order of the data set: sorted by index, each
        index once, also where the loader shuffles. Samplers whose units are no integers keep the
        order in which they gave them, and iterables, of which each rank has its own, come rank
        after rank.

    Raises:
        ConfigError: there is nothing, it was not finished, or it is damaged.
    """
    place = Path(folder)
    try:
        manifest = json.loads((place / _MANIFEST).read_text(encoding="utf-8"))
        files: dict[str, int] = manifest["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        if place.is_dir():
            why = f"it has no readable {_MANIFEST} ({type(error).__name__})"
        else:
            why = "there is no such folder"
        if partial(place).exists():
            why += f"; {partial(place)} is of a prediction that did not end"
        raise ConfigError(str(place), [why], "Predict again.") from None
    wrong = [
        f"{name} is missing or has not its {size} bytes"
        for name, size in files.items()
        if not (place / name).is_file() or (place / name).stat().st_size != size
    ]
    if wrong:
        raise ConfigError(str(place), wrong, "Predict again.")
    batches = []
    for name in files:
        rank = int(Path(name).parent.name.removeprefix("rank-"))
        read = torch.load(place / name, weights_only=True)
        batches += [(rank, Batch(**one)) for one in read]
    return Predictions(batches, manifest["order"])
