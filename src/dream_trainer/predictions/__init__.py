"""Predictions on disk: written by any number of ranks, read in the order of the data."""

from typing import TYPE_CHECKING

from dream_trainer.lazy_names import lazy_names

if TYPE_CHECKING:
    from dream_trainer.predictions.folder import Predictions, read_predictions

__getattr__, __dir__ = lazy_names(__name__, {"folder": "Predictions read_predictions"}, globals())

__all__ = ["Predictions", "read_predictions"]
