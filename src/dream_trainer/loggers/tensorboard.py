"""TensorBoard's own way to forget what a killed run wrote after its last checkpoint."""

from __future__ import annotations

from typing import Any


def purge_after(logger: Any, step: int) -> None:
    """Hide points of later steps, in the same log directory, once the next one is written.

    Nothing happens to loggers that write no TensorBoard files.
    """
    writer: Any = getattr(logger, "experiment", None)
    if hasattr(writer, "purge_step") and hasattr(writer, "close"):
        writer.close()  # the next file of events begins with the order to purge
        writer.purge_step = step + 1
