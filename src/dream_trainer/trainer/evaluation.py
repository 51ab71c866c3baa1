"""What somebody asks of a trainer beside `fit`: validation, tests, predictions, exports."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from dream_trainer.callbacks.overview import Overview, overview
from dream_trainer.errors import ConfigError
from dream_trainer.trainer.ranks_elsewhere import run_on_ranks
from dream_trainer.trainer.restore import foretell, restore_once
from dream_trainer.trainer.running import evaluating_inside, running

if TYPE_CHECKING:
    from dream_trainer.trainer.base import BaseTrainer

Results = dict[str, float]
Weights = str | Path | None
"""A checkpoint whose weights count; None for the trainer's own."""


def validate(trainer: BaseTrainer, checkpoint: Weights) -> Results:
    """See `BaseTrainer.validate`."""
    if trainer.world.starts_functions:
        outcome = run_on_ranks(trainer, "validate", checkpoint=checkpoint)
        return cast("Results", outcome.result)
    with _evaluating(trainer, "validate", checkpoint):
        if checkpoint is None and not (trainer.is_resumed or trainer.progress.num_batches):
            where = trainer.run_directory
            trainer.world.print(f"no checkpoint in {where}: these are fresh weights")
        if trainer.loop.val_loader is None:
            raise ConfigError("validate", ["val_dataloader is None"], "Return one.")
        return trainer.loop.validate()


def test(trainer: BaseTrainer, dataloader: Iterable[Any] | None, checkpoint: Weights) -> Results:
    """See `BaseTrainer.test`."""
    if trainer.world.starts_functions:
        outcome = run_on_ranks(trainer, "test", dataloader, checkpoint=checkpoint)
        return cast("Results", outcome.result)
    with _evaluating(trainer, "test", checkpoint):
        given = trainer.test_dataloader() if dataloader is None else dataloader
        return trainer.loop.evaluations.test(trainer.adopted_loaders.required(given, "test"))


def predict(
    trainer: BaseTrainer,
    dataloader: Iterable[Any] | None,
    checkpoint: Weights,
    return_predictions: bool,
) -> list[Any]:
    """See `BaseTrainer.predict`."""
    if trainer.world.starts_functions:
        if return_predictions:
            raise ConfigError(
                "device_parameters",
                ["predict returns a part on each rank; this strategy starts them elsewhere"],
                "Predict with devices=1, or with a PredictionWriter and return_predictions=False.",
            )
        options = {"checkpoint": checkpoint, "return_predictions": False}
        run_on_ranks(trainer, "predict", dataloader, **options)
        return []
    with _evaluating(trainer, "predict", checkpoint):
        given = trainer.predict_dataloader() if dataloader is None else dataloader
        loader = trainer.adopted_loaders.required(given, "predict")
        return trainer.loop.evaluations.predict(loader, keep=return_predictions)


def export(
    trainer: BaseTrainer, path: str | Path, checkpoint: Weights, options: Mapping[str, Any]
) -> Path:
    """See `BaseTrainer.export`, for what `options` are."""
    if trainer.world.starts_functions:
        outcome = run_on_ranks(trainer, "export", path, checkpoint=checkpoint, **options)
        return cast("Path", outcome.result)
    # Only for those who ask for it.
    from dream_trainer.trainer.export import export as write

    with (
        _evaluating(trainer, "export", checkpoint),
        trainer.callbacks.evaluation(trainer, "export"),
    ):
        return write(trainer, Path(path), **options)


def summary(trainer: BaseTrainer, depth: int) -> Overview:
    """See `BaseTrainer.summary`."""
    if trainer.world.starts_functions:
        return cast("Overview", run_on_ranks(trainer, "summary", depth).result)
    if trainer.is_running:
        return overview(trainer, foretell(trainer), depth)
    with running(trainer):
        trainer.prepare()
        return overview(trainer, foretell(trainer), depth)


@contextmanager
def _evaluating(trainer: BaseTrainer, purpose: str, checkpoint: Weights) -> Iterator[None]:
    with evaluating_inside(trainer) if trainer.is_running else running(trainer):
        trainer.prepare()
        if checkpoint is None:
            restore_once(trainer, read_only=True)
            yield
        else:
            # Only for those who ask for it.
            from dream_trainer.trainer.on_checkpoint import weights_of

            with weights_of(trainer, checkpoint, purpose):
                yield
