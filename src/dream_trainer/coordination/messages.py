"""Last words: a thread that says them must not die of a reader that is gone."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import NoReturn


def tell(what: object) -> None:
    """Print a line to stderr, if somebody still reads it: Ctrl-C ends ``| tee`` first."""
    with suppress(OSError, ValueError):
        print(what, file=sys.stderr, flush=True)


def end_process(status: int) -> NoReturn:
    """End at once, from any thread; what was printed is kept."""
    with suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit(status)
