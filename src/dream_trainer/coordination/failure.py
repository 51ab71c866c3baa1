"""What went wrong on the rank that failed first."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import torch.distributed as dist

# How a collective fails when another rank has left. Gloo's errors are plain RuntimeErrors.
_WORDS_OF_COLLECTIVES = (
    "gloo",
    "nccl",
    "connection closed by peer",
    "connection reset by peer",
    "connection refused",
    "broken pipe",
    "timed out waiting",
)


@dataclass(frozen=True)
class RankFailure:
    """The first failure of a run on several ranks."""

    rank: int
    what: str
    """What happened to it, or the error that it raised."""
    place: str
    """Where it was: phase, step, epoch, batch."""
    is_frozen: bool = False
    """Whether its process may still be there."""

    def __str__(self) -> str:
        return f"rank {self.rank} failed first, in {self.place}: {self.what}"

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> RankFailure:
        return cls(**json.loads(text))


class RankFailedError(RuntimeError):
    """Another rank failed, so that this one could not go on."""

    def __init__(self, failure: RankFailure) -> None:
        self.failure = failure
        super().__init__(str(failure))


def is_left_alone(error: BaseException) -> bool:
    """Whether an error can be the consequence of another rank's end."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(word in text for word in _WORDS_OF_COLLECTIVES)
