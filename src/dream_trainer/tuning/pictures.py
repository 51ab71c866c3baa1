"""Drawings with matplotlib, which is loaded once somebody wants one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

from dream_trainer.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def axes_for(axes: Axes | None) -> Axes:
    """The axes that were given, or those of a new figure, which pyplot knows nothing of.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    if axes is not None:
        return axes
    require_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(6.4, 3.8), layout="constrained").subplots()


def require_matplotlib() -> None:
    """Refuse to draw without it.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "plot", ["matplotlib is not installed"], "Install it: pip install matplotlib."
        ) from error


def save_picture(axes: Axes, path: str | Path) -> None:
    """Write the figure of some axes into a file."""
    cast("Figure", axes.figure).savefig(path, dpi=110)
