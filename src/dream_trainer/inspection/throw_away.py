"""A run of a few steps that leaves nothing on disk, and what comes back from its ranks."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from dream_trainer.aside import nothing_on_disk, require_trainer, steps_alone
from dream_trainer.callbacks import Callback
from dream_trainer.errors import ConfigError
from dream_trainer.trainer.base import BaseTrainer, BaseTrainerConfig
from dream_trainer.trainer.default_callbacks import ON_SCREEN

if TYPE_CHECKING:
    from dream_trainer.data import ResumableLoader

Change = Callable[[Any], Any]


class Answer(Callback):
    """A callback whose last words reach the caller, also from ranks that are other processes."""

    folder: Path

    def tell(self, trainer: BaseTrainer, what: Any) -> None:
        """Leave the answer of this rank; it is pickled."""
        (self.folder / f"{trainer.world.rank:08d}").write_bytes(pickle.dumps(what))


class _RunDirectory(Callback):
    """Makes the directory that callbacks of a run with checkpoints may count on."""

    def pre_fit(self, trainer: BaseTrainer) -> None:
        trainer.run_directory.mkdir(parents=True, exist_ok=True)


def run_thrown_away(
    make_trainer: Callable[[Any], BaseTrainer],
    config: BaseTrainerConfig,
    *,
    steps: int,
    answer: Answer,
    callbacks: Mapping[str, Callback] | None = None,
    compile_model: bool | None = None,
    **training: Any,
) -> Any:
    """Fit a trainer for some steps, from the weights that a new run starts from.

    There are no checkpoints, no loggers and no validation. The run directory is a folder that is
    removed, for what callbacks of the user's write there. ``config`` stays as it is.

    Args:
        make_trainer: a trainer class, or a function from a configuration to a trainer.
        config: what it is called with.
        steps: optimizer steps of the run.
        answer: a callback, the last one; it calls `Answer.tell` on every rank.
        callbacks: further ones, before those that every run has.
        compile_model: instead of what the device parameters say.
        **training: instead of what the training parameters say.

    Returns:
        What the first rank of this process has told.

    Raises:
        ConfigError: it makes no trainer of this package, or the run came to no answer.
    """
    made = copy.copy(config)
    made.training_parameters = steps_alone(config.training_parameters, steps, **training)
    made.checkpoint_parameters = nothing_on_disk(config.checkpoint_parameters)
    if compile_model is not None:
        made.device_parameters = dataclasses.replace(
            config.device_parameters, compile_model=compile_model
        )
    made.loggers = {}
    with tempfile.TemporaryDirectory() as folder:
        made.root_dir = str(Path(folder, "runs"))
        answer.folder = Path(folder, "answers")
        answer.folder.mkdir()
        made.callbacks = {
            "inspection_folder": _RunDirectory(),
            **_copies(config.callbacks),
            **dict.fromkeys(ON_SCREEN),
            **(callbacks or {}),
            "inspection": answer,
        }
        trainer = require_trainer(make_trainer(made))
        trainer.fit()
        told = sorted(answer.folder.iterdir())
        if not told:
            raise ConfigError(
                "inspection",
                [f"the run ended after {trainer.global_step} steps: {trainer.stop_reason}"],
                "Ask for fewer steps.",
            )
        return pickle.loads(told[0].read_bytes())  # our own, of a moment ago


def _copies(callbacks: Mapping[str, Callback | None]) -> dict[str, Callback | None]:
    """Callbacks whose state may change; one that cannot be copied is taken as it is."""
    copies: dict[str, Callback | None] = {}
    for name, one in callbacks.items():
        try:
            copies[name] = copy.deepcopy(one)
        except Exception:  # noqa: BLE001 - any class, with any reason not to be copied
            copies[name] = one
    return copies


class ChangedBatches:
    """A train loader whose batches are changed, or repeated, on their way.

    Args:
        loader: of a trainer that is set up.
        is_cached: read one batch, and hand it out for ever.
        changes: index of a batch -> what it is replaced by, given the first batch.
    """

    def __init__(
        self,
        loader: ResumableLoader,
        *,
        is_cached: bool = False,
        changes: Mapping[int, Change] | None = None,
    ) -> None:
        self._loader = loader
        self._is_cached, self._changes = is_cached, changes or {}
        self._count = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def __iter__(self) -> Iterator[Any]:
        # Closed here, or an error's traceback would keep the loader's workers alive.
        with closing(iter(self._loader)) as batches:
            for batch in batches:
                while True:
                    change = self._changes.get(self._count)
                    self._count += 1
                    yield batch if change is None else change(batch)
                    if not self._is_cached:
                        break

    def install(self, trainer: BaseTrainer) -> None:
        """Let the trainer's loop read these."""
        trainer.loop.train_loader = cast("ResumableLoader", self)
