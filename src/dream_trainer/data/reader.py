"""What `ResumableLoader` asks of its two halves, one for map-style data and one for iterables."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from typing import Any, NamedTuple

from dream_trainer.data.sampling import Place


class HandedOut(NamedTuple):
    """A batch on its way to the training step."""

    batch: Any
    advance: int
    """How far the position moves with it."""
    num_samples: int | None
    num_samples_all_ranks: int | None
    is_last: bool | None
    units: Sequence[Any] = ()
    """What of the order was read for it; see `Reader.samples`."""


class Reader(ABC):
    """Reads an epoch from any position; epoch and position themselves are its owner's."""

    unit: str
    """What the position counts."""

    @abstractmethod
    def attach(self, place: Place) -> None:
        """Say which rank of how many this is."""

    @abstractmethod
    def read(
        self, epoch: int, position: int, *, looks_ahead: bool
    ) -> Generator[HandedOut, None, None]:
        """Batches from a position to the end of the epoch."""

    @abstractmethod
    def num_batches(self, epoch: int) -> int | None:
        """Batches of a whole epoch on this rank; None if the loader cannot tell."""

    @abstractmethod
    def length(self, epoch: int) -> int | None:
        """Units of a whole epoch; None if the loader cannot tell."""

    def checksum(self, epoch: int) -> int | None:
        """Of an order that must be the same on every rank; None if there is nothing to compare."""
        return None

    def num_samples_ahead(self, epoch: int, position: int, num_batches: int) -> list[int] | None:
        """Samples over all ranks in each of the next batches; None if the loader cannot tell."""
        return None

    def start_epoch(self) -> None:  # noqa: B027 - only iterables have something to forget
        """An epoch was left, at its end or before; the next is read from its beginning."""

    def rewind(self) -> None:  # noqa: B027
        """The first epoch is to be read again, as if nothing had been read."""

    def samples(self, units: Sequence[Any]) -> list[Any] | None:
        """What the data set was asked for, sample by sample; None if the loader cannot tell."""
        return None

    def close(self) -> None:  # noqa: B027 - iterables end their workers with each epoch
        """End worker processes that persist."""

    def state(self) -> dict[str, Any]:
        """What continuing needs beside epoch and position."""
        return {}

    def problems(self, state: Mapping[str, Any]) -> list[str]:
        """Why a state does not fit, whatever is allowed."""
        return []

    def load(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Take over what `state` gave."""
