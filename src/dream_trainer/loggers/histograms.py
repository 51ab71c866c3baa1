"""Loggers that take histograms and pictures, beside numbers."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from dream_trainer.world.value_counts import ValueCounts


class HistogramWriter(Protocol):
    """What takes histograms and pictures of a step."""

    def write(
        self, counts: Mapping[str, ValueCounts], pictures: Mapping[str, Tensor], step: int
    ) -> None:
        """Write them; a picture is of bytes, channels first."""


def histogram_writer(logger: Any) -> HistogramWriter | None:
    """A writer behind a logger of TensorBoard's or Weights & Biases' files; None behind others."""
    experiment = getattr(logger, "experiment", None)
    if hasattr(experiment, "add_histogram_raw"):
        return _TensorBoard(logger)
    if type(experiment).__module__.partition(".")[0] == "wandb":
        return _WandB(logger)
    return None


class _TensorBoard:
    def __init__(self, logger: Any) -> None:
        self._logger = logger

    def write(
        self, counts: Mapping[str, ValueCounts], pictures: Mapping[str, Tensor], step: int
    ) -> None:
        experiment = self._logger.experiment
        for name, one in counts.items():
            experiment.add_histogram_raw(
                name,
                min=one.low,
                max=one.high,
                num=one.num,
                sum=one.total,
                sum_squares=one.total_squares,
                bucket_limits=list(one.edges),
                bucket_counts=[0, *one.counts],  # nothing is below the first edge
                global_step=step,
            )
        for name, picture in pictures.items():
            experiment.add_image(name, picture, global_step=step)


class _WandB:
    def __init__(self, logger: Any) -> None:
        self._logger = logger

    def write(
        self, counts: Mapping[str, ValueCounts], pictures: Mapping[str, Tensor], step: int
    ) -> None:
        wandb = importlib.import_module("wandb")
        row: dict[str, Any] = {
            name: wandb.Histogram(np_histogram=(list(one.counts), list(one.edges)))
            for name, one in counts.items()
        }
        for name, picture in pictures.items():
            row[name] = wandb.Image(picture.permute(1, 2, 0).numpy())
        # As its logger writes numbers: a step of the run is a column, not the row's number.
        self._logger.experiment.log({**row, "trainer/global_step": step})
