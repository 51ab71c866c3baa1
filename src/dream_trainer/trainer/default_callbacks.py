"""The callbacks that every run has, and their order."""

from __future__ import annotations

from collections.abc import Mapping

from dream_trainer.callbacks import (
    Callback,
    CheckpointCallback,
    LearningRateMonitor,
    MetricLogger,
    ProgressBar,
    RunSummary,
    Timeline,
)

_KINDS: Mapping[str, type[Callback]] = {
    "lr": LearningRateMonitor,
    "metrics": MetricLogger,
    "summary": RunSummary,
    "progress": ProgressBar,
    "checkpoint": CheckpointCallback,
    "timeline": Timeline,
}
#: Names of all of them.
DEFAULT_CALLBACKS = tuple(_KINDS)
#: Those that write on the screen.
ON_SCREEN = ("summary", "progress")
#: Those that only tell, by the clock, and have no state.
TELLING = (*ON_SCREEN, "timeline")


def callbacks_of_a_run(configured: Mapping[str, Callback | None]) -> dict[str, Callback | None]:
    """All callbacks in their order.

    Values are logged before they are collected, and saved after everything else is done.

    Args:
        configured: by name; that of a default one replaces it.
    """
    replaced = {
        name: configured[name] if name in configured else kind() for name, kind in _KINDS.items()
    }
    added = {name: one for name, one in configured.items() if name not in replaced}
    return {"lr": replaced.pop("lr"), **added, **replaced}
