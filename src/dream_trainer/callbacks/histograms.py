"""Histograms: gradients, weights and batches as histograms, for loggers that take them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dream_trainer.callbacks.callback import Callback
from dream_trainer.errors import ConfigError
from dream_trainer.loggers.histograms import HistogramWriter, histogram_writer
from dream_trainer.world.component_state import parameter_names, parameters_of
from dream_trainer.world.value_counts import ValueCounts, count_values
from dream_trainer.world.wrappers import unwrap

if TYPE_CHECKING:
    from dream_trainer.trainer.base import BaseTrainer

_MOST_BINS = 512  # that Weights & Biases shows


class Histograms(Callback):
    """Writes ``gradients/<name>``, ``parameters/<name>`` and ``batch/<name>`` to loggers.

    Loggers of TensorBoard and Weights & Biases take histograms; ``metrics.jsonl`` has numbers
    alone. Gradients are those of the whole step, before clipping, and parameters those that they
    belong to; with ``precision="16-mixed"`` gradients still carry the loss scale. Sharded ones are
    counted where they lie: bins are common to all ranks, and only counts travel. A batch counts
    over all ranks.

    Costs nothing in other steps but a comparison. In every n-th one: a pass over the values, host
    synchronisations, and two collectives for the gradients of each optimizer, three for the batch.

    Args:
        every_n_steps: write after every n-th optimizer step.
        gradients: whether to write those.
        parameters: whether to write what optimizers train.
        batch: whether to write the tensors of the batch that ends the step.
        pictures: samples of the batch to show as ``pictures/<name>``, of rank 0, where a tensor is
            (samples, 1 or 3 channels, height, width).
        bins: of equal width, from the smallest to the largest value.

    Raises:
        ConfigError: a number that cannot work, or nothing to write.
    """

    def __init__(
        self,
        every_n_steps: int = 100,
        *,
        gradients: bool = True,
        parameters: bool = False,
        batch: bool = True,
        pictures: int = 0,
        bins: int = 64,
    ) -> None:
        problems = []
        if every_n_steps < 1:
            problems.append(f"every_n_steps is {every_n_steps}, and must be above 0")
        if not 1 <= bins <= _MOST_BINS:
            problems.append(f"bins is {bins}, and must be from 1 to {_MOST_BINS}")
        if pictures < 0:
            problems.append(f"pictures is {pictures}, and must not be below 0")
        if not (gradients or parameters or batch or pictures):
            problems.append("there is nothing to write")
        if problems:
            raise ConfigError("Histograms", problems)
        self.every_n_steps, self.bins = every_n_steps, bins
        self.gradients, self.parameters = gradients, parameters
        self.batch, self.pictures = batch, pictures
        self._writers: list[HistogramWriter] = []
        self._counts: dict[str, ValueCounts] = {}
        self._due = math.inf

    def pre_fit(self, trainer: BaseTrainer) -> None:
        """Look for loggers that take histograms; a broadcast."""
        self._counts, self._due = {}, math.inf
        world, loggers = trainer.world, trainer.loggers
        # On rank 0 alone: elsewhere a logger has no experiment. All ranks take part in counting.
        made = [histogram_writer(one) for one in loggers.values()] if world.is_global_zero else []
        self._writers = [one for one in made if one is not None]
        if world.broadcast(bool(self._writers)):
            self._choose_next(trainer)
        elif world.is_global_zero and (loggers or trainer.writes_run_directory):
            there = ", ".join(f"{n} ({type(one).__name__})" for n, one in loggers.items())
            warnings.warn(
                "Histograms writes nothing: no logger takes histograms (there is "
                f"{there or 'none'}). "
                "TensorBoardLogger and WandbLogger of lightning.pytorch.loggers do; name one in "
                "the configuration's loggers.",
                stacklevel=2,
            )

    def pre_optimizer_step(self, trainer: BaseTrainer, optimizer: Optimizer) -> None:
        """Count gradients and parameters, if this step is one of those that are written."""
        if trainer.progress.num_steps + 1 < self._due:
            return
        names = parameter_names(trainer.named_models())
        parameters = [(names.get(id(p)), p) for p in parameters_of([unwrap(optimizer)])]
        found: dict[str, Tensor | None] = {}
        for name, parameter in parameters:
            if name is not None and self.gradients:
                found[f"gradients/{name}"] = parameter.grad
            if name is not None and self.parameters:
                found[f"parameters/{name}"] = parameter
        self._counts |= count_values(found, self.bins, trainer.world)

    def post_train_step(
        self, trainer: BaseTrainer, result: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch, and write all that was counted."""
        if trainer.progress.num_steps < self._due:
            return
        pictures: dict[str, Tensor] = {}
        if self.batch:
            self._counts |= self._counted_batch(trainer, batch)
        if self.pictures and trainer.world.is_global_zero:
            pictures = {
                f"pictures/{name}": _grid(tensor[: self.pictures])
                for name, tensor in _tensors(batch)
                if _shows_pictures(tensor)
            }
        counts, self._counts = self._counts, {}
        for writer in self._writers:
            writer.write(counts, pictures, trainer.global_step)
        self._choose_next(trainer)

    def _choose_next(self, trainer: BaseTrainer) -> None:
        every = self.every_n_steps
        self._due = (trainer.global_step // every + 1) * every

    def _counted_batch(self, trainer: BaseTrainer, batch: Any) -> dict[str, ValueCounts]:
        own = {f"batch/{name}": tensor for name, tensor in _tensors(batch)}
        # Of rank 0: ranks whose batches have other parts would wait for each other.
        names = trainer.world.broadcast(list(own))
        is_filler = trainer.loop.train_loader.num_samples == 0
        found = {name: None if is_filler else own.get(name) for name in names}
        return count_values(found, self.bins, trainer.world, differ=True)


def _tensors(batch: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a batch by path; a batch that is one tensor is ``0``."""
    if isinstance(batch, Tensor):
        yield name or "0", batch
    elif isinstance(batch, Mapping):
        for key, value in batch.items():
            yield from _tensors(value, f"{name}/{key}".lstrip("/"))
    elif isinstance(batch, (list, tuple)):
        for index, value in enumerate(batch):
            yield from _tensors(value, f"{name}/{index}".lstrip("/"))


def _shows_pictures(tensor: Tensor) -> bool:
    return tensor.ndim == 4 and tensor.shape[1] in (1, 3) and tensor.numel() > 0


def _grid(pictures: Tensor) -> Tensor:
    """Pictures side by side, as bytes: (channels, height, width), on the CPU."""
    pictures = pictures.detach().cpu()
    if pictures.dtype is not torch.uint8:
        pictures = torch.nan_to_num(pictures.float(), posinf=0.0, neginf=0.0)
        low, high = torch.aminmax(pictures)
        pictures = ((pictures - low) * (255 / (high - low).clamp(min=1e-12))).round().byte()
    number, channels, height, width = pictures.shape
    columns = math.ceil(math.sqrt(number))
    rows = math.ceil(number / columns)
    grid = torch.zeros(channels, rows * (height + 1) - 1, columns * (width + 1) - 1).byte()
    for index, picture in enumerate(pictures):
        top, left = index // columns * (height + 1), index % columns * (width + 1)
        grid[:, top : top + height, left : left + width] = picture
    return grid
