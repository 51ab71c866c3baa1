"""What a logger must be able to do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol


class Logger(Protocol):
    """Any Lightning or Fabric logger fits; so does a class with these two methods."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> Any:
        """Record values at a step. Called on rank 0 only."""

    def finalize(self, status: str) -> Any:
        """Write what is pending; ``status`` is ``"success"`` or ``"failed"``."""
