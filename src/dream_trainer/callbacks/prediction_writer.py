"""PredictionWriter: what is predicted goes to disk while it is predicted."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dream_trainer.callbacks.callback import Callback
from dream_trainer.errors import ConfigError
from dream_trainer.predictions import folder as folders
from dream_trainer.predictions.samples import batch_of, whole_of

if TYPE_CHECKING:
    from dream_trainer.predictions.folder import Batch, Order
    from dream_trainer.trainer.base import BaseTrainer


class PredictionWriter(Callback):
    """Writes what ``predict_step`` returns, on every rank its own, with the samples it is of.

    `read_predictions` gives all of it in the order of the data set. The folder appears when
    everything is written; a prediction that was interrupted leaves none, and is begun anew.

    Args:
        folder: on a file system that all ranks share.
        write: ``"batch"`` writes a file a batch, so that memory stays as it is with
            ``predict(return_predictions=False)``; ``"epoch"`` one a rank, at the end.
        overwrite: replace predictions that are there, once the new ones are whole.

    Raises:
        ConfigError: ``write`` is neither.
    """

    def __init__(
        self,
        folder: str | Path,
        write: Literal["batch", "epoch"] = "batch",
        *,
        overwrite: bool = False,
    ) -> None:
        if write not in ("batch", "epoch"):
            raise ConfigError("PredictionWriter", [f"write={write!r} is no 'batch' or 'epoch'"])
        self.folder, self.write, self.overwrite = Path(folder), write, overwrite
        self._forget()

    def _forget(self) -> None:
        self._batches: list[Batch] = []
        self._num_files = self._num_samples = 0
        self._order: Order = "index"

    def pre_predict_epoch(self, trainer: BaseTrainer) -> None:
        """Make the folder, beside its place."""
        self._forget()
        trainer.world.ranks.on_zero(lambda: folders.begin(self.folder, overwrite=self.overwrite))

    def post_predict_step(
        self, trainer: BaseTrainer, result: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write what was predicted, or keep it until the end."""
        if trainer.world.tp_rank != 0:
            return  # it has the same samples as tp_rank 0
        loader = trainer.loop.evaluations.loader
        assert loader is not None
        asked, is_split = loader.sample_indices, loader.gives_batches
        if is_split:
            content, count = batch_of(result, None if asked is None else len(asked))
        else:
            content, count = whole_of(result), 1
        indices = None if asked is None else _integers(asked)
        if indices is None:
            self._order = "rank" if asked is None else "read"
        self._num_samples += count
        self._batches.append(folders.Batch(batch_idx, indices, count, content, is_split))
        if self.write == "batch":
            self._write(trainer)

    def post_predict_epoch(self, trainer: BaseTrainer, results: Sequence[Any]) -> None:
        """Write the rest, and let the folder appear."""
        if self._batches:
            self._write(trainer)
        mine = (self._num_files, self._num_samples, self._order)
        per_rank = trainer.world.all_gather_object(mine)
        num_files = [files for files, _, _ in per_rank]
        num_samples = sum(samples for _, samples, _ in per_rank)
        # A rank without samples of its own has nothing to say about their order.
        orders = {order for files, _, order in per_rank if files}
        order: Order = next((one for one in ("rank", "read") if one in orders), "index")
        self._forget()
        trainer.world.ranks.on_zero(
            lambda: folders.finish(self.folder, order, num_files, num_samples)
        )

    def _write(self, trainer: BaseTrainer) -> None:
        folders.write(self.folder, trainer.world.dp_rank, self._batches)
        self._num_files += 1
        self._batches = []


def _integers(asked: Sequence[Any]) -> list[int] | None:
    """Indices of any integer type as integers; None if a sampler gave something else."""
    try:
        return [operator.index(one) for one in asked]
    except TypeError:
        return None
