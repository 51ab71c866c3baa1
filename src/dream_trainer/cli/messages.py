"""What a failed command says, and with which status it ends."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
import traceback
from collections.abc import Iterator
from typing import TextIO

from dream_trainer.errors import CheckpointError, ConfigError, StateError

_RANK_VARIABLES = (
    "RANK",
    "SLURM_PROCID",
    "JSM_NAMESPACE_RANK",
    "OMPI_COMM_WORLD_RANK",
    "PMI_RANK",
    "NODE_RANK",
    "LOCAL_RANK",
)
_SECONDS_FOR_RANK_0 = 10.0


@contextlib.contextmanager
def exit_statuses(prog: str, with_traceback: bool = False) -> Iterator[None]:
    """Ends the program with a message, where a traceback would not help.

    2 is a configuration that cannot work, 1 a checkpoint that cannot be used, 130 Ctrl-C. Every
    other exception passes through.
    """
    try:
        yield
    except ConfigError as error:
        if with_traceback:
            traceback.print_exc()
        # The launcher's children, and torchrun's ranks, meet the same configuration.
        if launched_rank() == 0:
            print(f"{prog}: error: {error}", file=sys.stderr)
        elif "TORCHELASTIC_RUN_ID" in os.environ:
            # torchrun ends all ranks with the first that ends: rank 0 would not get to speak.
            time.sleep(_SECONDS_FOR_RANK_0)
        raise SystemExit(2) from None
    except (CheckpointError, StateError) as error:
        if with_traceback:
            traceback.print_exc()
        where = f" (rank {rank})" if (rank := launched_rank()) else ""
        print(f"{prog}: error{where}: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


@contextlib.contextmanager
def first_rank_speaks() -> Iterator[None]:
    """Silences help, usage and printed configurations of all ranks but the first."""
    if launched_rank() == 0:
        yield
        return
    streams = _Muted(sys.stdout), _Muted(sys.stderr)
    try:
        with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
            yield
    finally:
        for one in streams:
            one.is_muted = False


class _Muted(io.TextIOBase):
    """A stream that writes nothing while it is muted.

    A library that is imported meanwhile may keep it, as a handler of ``logging`` does: a stream
    that is closed by then would cost a traceback a message.
    """

    def __init__(self, stream: TextIO) -> None:
        self.is_muted, self._stream = True, stream

    def write(self, text: str) -> int:
        return len(text) if self.is_muted else self._stream.write(text)

    def flush(self) -> None:
        self._stream.flush()

    def fileno(self) -> int:
        return self._stream.fileno()

    def isatty(self) -> bool:
        return self._stream.isatty()


def launched_rank() -> int:
    """Number that a launcher gave this process; 0 for the first one, and without a launcher."""
    given = (os.environ.get(name, "") for name in _RANK_VARIABLES)
    # The largest: Fabric's children on a SLURM node all have SLURM_PROCID=0.
    return max((int(value) for value in given if value.isdigit()), default=0)
