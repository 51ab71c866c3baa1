"""BaseTrainer: the run. Launch, configure, setup, restore, loop, close."""

from __future__ import annotations

import copy
import itertools
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from torch import Tensor, nn
from torch.optim import Optimizer

from dream_trainer import checkpointing, schedules, world
from dream_trainer.accumulation import AccumulationWindow, Weight
from dream_trainer.callbacks import (
    Callback,
    CallbackList,
    CheckpointCallback,
    LearningRateMonitor,
    MetricLogger,
    ProgressBar,
    RunSummary,
    Timeline,
)
from dream_trainer.callbacks.overview import Overview, overview
from dream_trainer.callbacks.run_summary import end_line
from dream_trainer.configs import CheckpointParameters, Link, TrainingParameters
from dream_trainer.configs.differing import flattened
from dream_trainer.configs.yaml_text import load_yaml
from dream_trainer.coordination import Interruption, Place, RankWatch, StopAgreement
from dream_trainer.data import ResumableLoader
from dream_trainer.errors import ConfigError
from dream_trainer.host_values import Value
from dream_trainer.loggers import Logger
from dream_trainer.loop import FitLoop
from dream_trainer.measured import MeasuredValues
from dream_trainer.metrics import LoggedValues
from dream_trainer.randomness import all_preserved, seed_everything
from dream_trainer.reductions import Reduce
from dream_trainer.storage.run_lock import RunLock
from dream_trainer.trainer.abstract import AbstractTrainer, AbstractTrainerConfig
from dream_trainer.trainer.closing import close
from dream_trainer.trainer.components import Components, copy_of_unsharded, find_module
from dream_trainer.trainer.frozen_weights import FrozenWeights
from dream_trainer.trainer.loaders import (
    accumulation_scheduler,
    adopt_loader,
    count_training_steps,
)
from dream_trainer.trainer.metric_phases import MetricPhases
from dream_trainer.trainer.monitored import Monitored
from dream_trainer.trainer.nonfinite import StepGuard
from dream_trainer.trainer.optimizer_steps import OptimizerSteps
from dream_trainer.trainer.presets import Preset, debug, overfit
from dream_trainer.trainer.ranks_elsewhere import bring_back, run_on_ranks
from dream_trainer.trainer.restore import (
    foretell,
    lock_run_directory,
    open_run_directory,
    restore,
)
from dream_trainer.trainer.run_directory import (
    config_yaml,
    fresh_experiment_name,
    recorded_or_new_seed,
)
from dream_trainer.trainer.run_streams import RunStreams
from dream_trainer.trainer.running import evaluating_inside, running
from dream_trainer.trainer.scheduler_steps import SchedulerSteps
from dream_trainer.trainer.state import (
    OwnState,
    apply_state,
    check_finite,
    first_nonfinite,
    gather_state,
    seed_rank,
)
from dream_trainer.world.wrappers import unwrap

if TYPE_CHECKING:
    from plotly.graph_objects import Figure
    from typing_extensions import Self

#: The next one without a name in this process, as in every restart of its job.
_runs_without_name = itertools.count()


@dataclass(kw_only=True)
class BaseTrainerConfig(AbstractTrainerConfig):
    """A run's length and rhythm, its checkpoints, its callbacks and loggers."""

    training_parameters: TrainingParameters = field(default_factory=TrainingParameters)
    """Length, accumulation, clipping, validation."""
    checkpoint_parameters: CheckpointParameters = field(default_factory=CheckpointParameters)
    """Triggers, retention, resume."""
    callbacks: dict[str, Callback | None] = field(default_factory=dict)
    """Callbacks by name, on top of ``lr``, ``metrics``, ``summary``, ``progress``, ``checkpoint``
    and ``timeline``; the same name replaces one, None leaves it out."""
    loggers: dict[str, Any] = field(default_factory=dict)
    """Lightning loggers by name, beside the exact JSONL log."""

    def __post_init__(self) -> None:
        super().__post_init__()
        kinds = {
            "training_parameters": TrainingParameters,
            "checkpoint_parameters": CheckpointParameters,
            "callbacks": Mapping,
            "loggers": Mapping,
        }
        problems = [
            f"{name} is a {type(value).__name__}, expected a {kind.__name__}"
            for name, kind in kinds.items()
            if not isinstance(value := getattr(self, name), kind)
        ]
        problems += [
            f"loggers.{name} is a {type(one).__name__}, which has no log_metrics and finalize"
            for name, one in (self.loggers.items() if isinstance(self.loggers, Mapping) else ())
            if one is not None and not (hasattr(one, "log_metrics") and hasattr(one, "finalize"))
        ]
        if problems:
            raise ConfigError(
                type(self).__name__, problems, "Callbacks and loggers are mappings by name."
            )


class BaseTrainer(AbstractTrainer):
    """A trainer that runs: the fit loop, exact state, checkpoints, callbacks.

    A subclass makes its components (``configure``, ``setup``, ``named_models``,
    ``named_optimizers``, ``named_schedulers``, ``train_dataloader``, ``val_dataloader``) and
    writes ``training_step`` and ``validation_step``. `DreamTrainer` has conventions for
    the first part.

    Args:
        config: the run's configuration.
        fabric: a ``Fabric`` to run on, launched already or not.

    Attributes:
        callbacks: all callbacks, by name.
        loggers: loggers beside the JSONL log, by name; those of the Fabric are ``fabric_0`` and
            so on.
        metrics: torchmetrics by phase.
        place: what this rank is doing, for messages of failures.
        interruption: where requests to stop come together.
        watch: the eye on the other ranks.
        streams: the run's random streams.
        window: the accumulation window under way.
        guard: asked before each step, if ``on_nonfinite`` is ``"skip"``.
        logged: values logged since the last step.
        measured: values measured since the last line of the timeline.
        began: when `fit` was called, in seconds since 1970.
        resumed_from: name of the checkpoint that the run continues from, if there is one.
        monitored: values that decide about the run, by name.
        is_running: whether `fit`, `validate`, `test` or `predict` is under way.
        is_fitting: whether `fit` is under way.
        is_prepared: whether `prepare` is done.
        is_resumed: whether the run continues from a checkpoint.
        origin: how the run has started, for people; empty before.
        is_brought_back: whether ranks that were forked or spawned have ended, and left this.
        is_closed: whether `close` was called.
        is_interrupted_between_batches: in ``on_interrupt``, whether the state is whole.
        stop_reason: what `stop` was told; None while the run may go on.
        validation_results: of the last validation of the run, by name.
        describe_config: gives the text of ``config.yaml`` for the configuration of the run.
    """

    config: BaseTrainerConfig
    presets: ClassVar[Mapping[str, Preset | None]] = {"debug": debug, "overfit": overfit}
    """Functions from configuration to configuration by name, beside the inherited ones; None
    takes an inherited one away."""
    links: ClassVar[Sequence[Link]] = ()
    """Values that the command line takes from others, a model's width from a data set's."""

    def __init__(self, config: BaseTrainerConfig, *, fabric: world.Fabric | None = None) -> None:
        super().__init__(config, fabric=fabric)
        defaults: dict[str, Callback | None] = {
            "lr": LearningRateMonitor(),
            "metrics": MetricLogger(),
            "summary": RunSummary(),
            "progress": ProgressBar(),
            "checkpoint": CheckpointCallback(),
            "timeline": Timeline(),
        }
        replaced = {name: config.callbacks.get(name, one) for name, one in defaults.items()}
        added = {name: one for name, one in config.callbacks.items() if name not in defaults}
        # Values are logged before they are collected, and saved after everything else is done.
        self.callbacks = CallbackList(
            {"lr": replaced.pop("lr"), **added, **replaced}, foreign=self.world.callbacks
        )
        self.loggers: dict[str, Logger] = {
            name: one for name, one in config.loggers.items() if one is not None
        }
        for index, one in enumerate(self.world.loggers):
            self.loggers.setdefault(f"fabric_{index}", one)
        self.metrics = MetricPhases(self)
        self.logged, self.measured = LoggedValues(), MeasuredValues()
        self.began, self.resumed_from = 0.0, cast("str | None", None)
        self.monitored = Monitored(self)
        self.is_running = self.is_fitting = self.is_resumed = False
        self.is_interrupted_between_batches = False
        self.is_brought_back = self.is_closed = False
        self.stop_reason: str | None = None
        self.origin = ""
        self._connect()
        self.validation_results: Mapping[str, float] = {}
        self.describe_config: Callable[[Any], str] = config_yaml
        self.is_prepared = self._is_restored = False
        self.streams = RunStreams(self.progress)
        self._loaders: dict[str, ResumableLoader] = {}
        self.window = AccumulationWindow(1, 1, _on_its_own)
        self.guard: StepGuard | None = None

    def _connect(self) -> None:
        """Make what looks at the other ranks and at signals."""
        self.place = Place()
        agreement = StopAgreement(lambda: self.watch.require_all())
        timeout = self.config.device_parameters.failure_timeout_seconds
        self.watch = RankWatch(self.place, agreement, timeout)
        self.interruption = Interruption(
            agreement,
            self.training_parameters.preemption_signals,
            self.training_parameters.grace_seconds,
            is_pointless=self.watch.look_now,
        )

    def __getstate__(self) -> dict[str, Any]:
        # Locks cannot be sent to a spawned rank, which makes its own.
        return {n: v for n, v in vars(self).items() if n not in ("place", "watch", "interruption")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._connect()

    # ------------------------------------------------------------------ what users write

    @abstractmethod
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """One batch: forward, `backward`, `step`.

        Args:
            batch: what the train loader gave, on the device.
            batch_idx: index of the batch in the epoch, from 0.

        Returns:
            A mapping of scalars to log, a loss, or None. ``"weight"`` in a mapping is not logged:
            it is how much the batch counts in means, instead of its number of samples.
        """

    @abstractmethod
    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        """One validation batch, without gradients and in eval mode.

        Returns:
            A mapping of scalars, averaged over samples and ranks; a loss; or None. ``"weight"`` in
            a mapping is how much the batch counts, instead of its number of samples.
        """

    def test_step(self, batch: Any, batch_idx: int) -> Any:
        """One test batch; the default is `validation_step`."""
        return self.validation_step(batch, batch_idx)

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        """One batch to predict on; what it returns is collected."""
        raise NotImplementedError(f"{type(self).__name__} has no predict_step; write one")

    def named_schedules(self) -> Mapping[str, schedules.Schedule]:
        """When each of `named_schedulers` steps; the default is after each optimizer step.

        Raises:
            ConfigError: a scheduler cannot step so.
        """
        return {
            name: schedules.Schedule.of(one)
            for name, one in (self.named_schedulers() or {}).items()
        }

    def schedulers_of(self, optimizer: Optimizer) -> list[Any]:
        """All schedulers that drive an optimizer, whoever steps them.

        Args:
            optimizer: as made or as wrapped.
        """
        every: Iterable[Any] = (self.named_schedulers() or {}).values()
        return [one for one in every if unwrap(one.optimizer) is unwrap(optimizer)]

    def test_dataloader(self) -> Iterable[Any] | None:
        """Make the loader of `test`; called when it runs without one."""
        return None

    def predict_dataloader(self) -> Iterable[Any] | None:
        """Make the loader of `predict`; called when it runs without one."""
        return None

    def export_example(self, batch: Any) -> Any:
        """What the model is called with for a batch, for `export`; write it to export programs.

        Returns:
            One argument, a tuple of arguments, or a mapping of arguments by name.
        """
        raise ConfigError(
            type(self).__name__,
            ["export runs the model on an example, and export_example does not say on which"],
            "Write it: def export_example(self, batch): return batch[0]; or pass export(example=).",
        )

    def unplaced_model(self, name: str) -> nn.Module:
        """A copy of a model as on one device, in host memory, for `export`; weights come later.

        Raises:
            ConfigError: it is sharded, and only its author can make it anew.
        """
        return copy_of_unsharded(self.components.models[name], name)

    # ------------------------------------------------------------------ what users call

    def fit(self) -> None:
        """Train: launch, configure, set up, restore, loop, close.

        Raises:
            ConfigError: nothing would end the run, or the configuration cannot work.
            NonFiniteError: a loss, norm, parameter or optimizer state is not finite.
        """
        if not self.training_parameters.is_limited:
            raise ConfigError(
                "training_parameters",
                ["n_epochs, max_steps and max_time are all None, so nothing ends the run"],
                "Set one of them.",
            )
        if self.is_in_step:
            raise RuntimeError(
                "an exception left this trainer in the middle of a training step. Make a new one: "
                "it continues from the last checkpoint."
            )
        if self.is_brought_back:
            raise RuntimeError(
                "the ranks of this trainer have ended; what is here is what they left. Make a new "
                "one: it continues from the last checkpoint."
            )
        if self.world.starts_functions:
            with all_preserved():
                bring_back(self, run_on_ranks(self, "fit"))
            return
        self.began = time.time()
        with running(self):
            self.stop_reason = None
            self.prepare()
            if self.writes_run_directory:
                lock_run_directory(self, create=False)
            was_restored = self._is_restored
            self._restore(read_only=False)
            if self.writes_run_directory:
                lock_run_directory(self, create=True)
                open_run_directory(self)
            if was_restored and self.progress.num_batches:
                self.origin = end_line(self, "going on")
            if self.origin and not self._has_summary:
                self.world.print(self.origin)
            self.is_fitting = True
            self.callbacks.pre_fit(self)
            self.loop.sanity_check()
            # The streams of the first step depend on the seed, or on the checkpoint, alone.
            if not self.streams.take_up() and not self.progress.num_batches:
                seed_rank(self)
            self.loop.run()
            self.place.enter("end")
            self.callbacks.post_fit(self)
            self.checkpointer.wait()
        if not self._has_summary:
            self.world.print(end_line(self, self.stop_reason or "done"))

    def validate(self, checkpoint: str | Path | None = None) -> dict[str, float]:
        """Validate once, on the state that `fit` would continue from.

        Args:
            checkpoint: validate on its weights instead, and put the trainer's own back: ``"best"``,
                ``"last"``, the name of one of the run's checkpoints, or a path in one of the forms
                of ``init_from``. Costs host memory for a copy of this rank's weights.

        Returns:
            The results, the same on every rank.

        Raises:
            CheckpointError: the checkpoint is damaged.
            ConfigError: there is no such checkpoint, or no loader.
            StateError: the checkpoint is of another model.
        """
        if self.world.starts_functions:
            outcome = run_on_ranks(self, "validate", checkpoint=checkpoint)
            return cast("dict[str, float]", outcome.result)
        with self._evaluation("validate", checkpoint):
            if checkpoint is None and not (self.is_resumed or self.progress.num_batches):
                self.world.print(f"no checkpoint in {self.run_directory}: these are fresh weights")
            if self.loop.val_loader is None:
                raise ConfigError("validate", ["val_dataloader is None"], "Return one.")
            return self.loop.validate()

    def test(
        self, dataloader: Iterable[Any] | None = None, *, checkpoint: str | Path | None = None
    ) -> dict[str, float]:
        """Run ``test_step`` over a loader.

        Args:
            dataloader: instead of `test_dataloader`.
            checkpoint: test on its weights, as in `validate`.

        Returns:
            The results, the same on every rank.

        Raises:
            ConfigError: there is no loader, or no such checkpoint.
        """
        if self.world.starts_functions:
            outcome = run_on_ranks(self, "test", dataloader, checkpoint=checkpoint)
            return cast("dict[str, float]", outcome.result)
        with self._evaluation("test", checkpoint):
            loader = self._adopt(self._loader_of(dataloader, "test"), "test")
            return self.loop.test(loader)

    def predict(
        self,
        dataloader: Iterable[Any] | None = None,
        *,
        checkpoint: str | Path | None = None,
        return_predictions: bool = True,
    ) -> list[Any]:
        """Run ``predict_step`` over a loader.

        Args:
            dataloader: instead of `predict_dataloader`.
            checkpoint: predict with its weights, as in `validate`.
            return_predictions: False keeps nothing of what it returns, which a
                `PredictionWriter` has written.

        Returns:
            What it returned for each batch of this rank, in order.

        Raises:
            ConfigError: there is no loader, or no such checkpoint.
        """
        if self.world.starts_functions:
            if return_predictions:
                raise ConfigError(
                    "device_parameters",
                    ["predict returns a part on each rank; this strategy starts them elsewhere"],
                    "Predict with devices=1, or with a PredictionWriter and "
                    "return_predictions=False.",
                )
            options = {"checkpoint": checkpoint, "return_predictions": False}
            run_on_ranks(self, "predict", dataloader, **options)
            return []
        with self._evaluation("predict", checkpoint):
            loader = self._adopt(self._loader_of(dataloader, "predict"), "predict")
            return self.loop.predict(loader, keep=return_predictions)

    def export(
        self,
        path: str | Path,
        *,
        checkpoint: str | Path | None = None,
        model: str | None = None,
        example: Any = None,
        overwrite: bool = False,
    ) -> Path:
        """Write a model to one file; the ending says how.

        ``.pt2`` is a program of ``torch.export``, ``.onnx`` one for other runtimes: in eval mode,
        for any batch size, and checked on the example before the file appears. ``.safetensors``,
        ``.pt`` and ``.pth`` are weights, as those of `export_checkpoint`, which needs no trainer.
        Sharded weights are gathered, and rank 0 writes.

        Args:
            path: of the file.
            checkpoint: whose weights, as in `validate`.
            model: the one model to export, if there are several.
            example: what the model is called with, of at least two samples, as `export_example`
                returns it; None asks that for a batch of the validation loader.
            overwrite: replace the file if it exists.

        Returns:
            The path.

        Raises:
            ConfigError: the model cannot be exported, or the program computes something else.
        """
        options = {"model": model, "example": example, "overwrite": overwrite}
        if self.world.starts_functions:
            return cast(
                "Path", run_on_ranks(self, "export", path, checkpoint=checkpoint, **options).result
            )
        # Only for those who ask for it.
        from dream_trainer.trainer.export import export

        with self._evaluation("export", checkpoint), self.callbacks.evaluation(self, "export"):
            return export(self, Path(path), **options)

    def summary(self, depth: int = 1) -> Overview:
        """What `fit` is about to do: ``print(trainer.summary())``. Nothing is loaded or written.

        Every rank calls it: it launches and sets up.

        Args:
            depth: levels of modules below each model.
        """
        if self.world.starts_functions:
            return cast("Overview", run_on_ranks(self, "summary", depth).result)
        if self.is_running:
            return overview(self, foretell(self), depth)
        with running(self):
            self.prepare()
            return overview(self, foretell(self), depth)

    def backward(self, loss: Tensor, weight: Weight | None = None) -> None:
        """Backward pass, scaled so that the step's gradient is a mean over its window.

        Args:
            loss: mean over the samples of the batch; a scalar.
            weight: how much the batch counts, the number of its tokens for example. The step's
                gradient is then the weighted mean over the window and all data-parallel ranks.
        """
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            found = (
                f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            )
            raise TypeError(f"the loss is a tensor with one element, got {found}; call .mean()")
        place = self.place
        if self.guard is not None:
            self.guard.note_loss(loss)
        place.enter("backward")
        self._backward(*self.window.weighted(loss, weight))
        place.enter("training_step")

    def step(self, optimizer: Optimizer | str | None = None) -> Tensor | None:
        """Clip, step, zero the gradients, and step the optimizer's scheduler.

        Does nothing while gradients accumulate, so it can be called after every backward.

        Args:
            optimizer: one of `named_optimizers`, or its name; may be left out if there is only
                one.

        Returns:
            The norm of the gradients before clipping, as a tensor without dimensions on the
            device, if clipping or ``track_grad_norm`` is on.
        """
        if self.window.is_accumulating:
            return None
        return self._optimizer_steps.take(optimizer)

    def log(
        self, name: str, value: Value, *, reduce: Reduce = "mean", weight: Value | None = None
    ) -> None:
        """Log one value with the step, or the validation, under way.

        It is reduced over the batches of the step (of the validation) and all data-parallel
        ranks, when rows are written: logging costs no synchronisation. On every rank.

        Args:
            name: in the row, as it is.
            value: a number, or a tensor with one element, which stays on the device.
            reduce: how values of the same name become one.
            weight: how much this one counts in the mean; 1 if left out.

        Raises:
            ValueError: there is no such reduction, or a weight for another one than the mean.
        """
        if reduce == "mean":
            self.logged.add({name: value}, 1.0 if weight is None else weight)
        else:
            self.log_dict({name: value}, reduce=reduce, weight=weight)

    def log_dict(
        self,
        values: Mapping[str, Value],
        *,
        reduce: Reduce = "mean",
        weight: Value | None = None,
    ) -> None:
        """Log values with the step under way; see `log`."""
        if reduce == "mean":
            self.logged.add(values, 1.0 if weight is None else weight)
            return
        if weight is not None:
            raise ValueError(f"a weight counts in means, and {', '.join(values)} is a {reduce}")
        for name, value in values.items():
            self.logged.add_reduced(name, value, reduce)

    def log_measured(self, name: str, value: Value, *, reduce: Reduce = "mean") -> None:
        """Log what a clock or a meter says: no two runs have the same, so no exact log has it.

        It is in the next line of progress of ``timeline.jsonl``, and goes to the loggers, as the
        mean (or what `reduce` says) of the seconds between two lines. Rank 0's own counts.

        Args:
            name: ``"memory/host_gib"``, for example.
            value: a number, or a tensor with one element, which stays on the device until then.
            reduce: how values of the same name become one.
        """
        self.measured.add(name, value, reduce)

    def stop(self, reason: str) -> None:
        """End the run after the step under way, or, on several ranks, after one they agree on.

        One rank is enough. If all call it at the same place, that step is the last one.
        """
        if self.is_fitting and self.world.size > 1:
            self.interruption.stop(reason)
        else:
            self.stop_reason = reason

    def close(self) -> None:
        """Let go of what outlives a run on several ranks: the process group, if this opened it.

        Until then the trainer can go on: ``test`` after ``fit``, say. Afterwards its attributes
        hold the modules as they were made; their weights are those of the run, or this rank's
        shards of them. ``with MyTrainer(config) as trainer`` calls it at the end of the block.
        Every rank calls it. On several ranks a block that an exception leaves does not: others
        may not come, and the traceback holds the models.

        Raises:
            RuntimeError: a run is under way.
        """
        if self.is_running:
            raise RuntimeError("a run is under way; stop it first, with trainer.stop(reason)")
        if not self.is_closed:
            self.is_closed = True
            close(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or not self.world.is_launched or self.world.size == 1:
            self.close()

    def clock(self) -> float:
        """Seconds from any start, for ``max_time``; a test may override it."""
        return time.monotonic()

    def save_checkpoint(self, path: str | Path) -> None:
        """Write a checkpoint directory; every rank calls it.

        Raises:
            CheckpointError: writing failed; nothing is left behind.
            NonFiniteError: something in the state is not finite.
        """
        self.place.enter("save")
        state = self.checked_state_dict()
        self.checkpointer.write(path, state, step=self.global_step, epoch=self.current_epoch)

    def load_checkpoint(self, path: str | Path, strict: bool = True) -> None:
        """Continue from a checkpoint directory, whatever strategy and ranks wrote it.

        Raises:
            CheckpointError: it is damaged, unsafe or of another format.
            StateError: it does not fit.
        """
        self.prepare()
        loaded = self.checkpointer.load(path, self.components.template())
        self.load_state_dict(OwnState(loaded.state), strict)
        self.resumed_from = loaded.path.name

    def plot(self, *names: str, x: Literal["step", "time"] = "step", log: bool = False) -> Figure:
        """Draw what the run has logged so far, from its own log.

        In a notebook it shows itself as the last value of a cell. Metrics logged since the last
        rows were written are not in it yet. Any rank can call it.

        Args:
            names: metrics, ``trainer.plot("train/loss", "val/loss")``; all without one.
            x: optimizer steps, or hours since the run began.
            log: logarithmic values.

        Returns:
            A plotly figure.

        Raises:
            ConfigError: nothing was logged, or not that, or plotly is not installed.
        """
        # Here, because only those who look load it.
        from dream_trainer.reporting import plot_runs

        return plot_runs(self.run_directory, names=names, x=x, log=log)

    def batch_to_device(self, batch: Any) -> Any:
        """Move a batch of any loader; override it for what does not move by itself."""
        return self.world.to_device(batch)

    # ------------------------------------------------------------------ what callbacks read

    def hyperparameters(self) -> dict[str, Any]:
        """What loggers are given of the configuration: plain data by dotted name.

        It is what ``config.yaml`` has. Override it for more, or for less.
        """
        return flattened(load_yaml(self.describe_config(self.config)))

    @property
    def has_validation_hooks(self) -> bool:
        """Whether somebody does something before a validation that ends after it."""
        return self.callbacks.overrides("pre_validation_epoch")

    @property
    def moves_batches(self) -> bool:
        """Whether `batch_to_device` has anything to do; every training batch asks."""
        return self.world.moves_batches or (
            type(self).batch_to_device is not BaseTrainer.batch_to_device
        )

    @property
    def training_parameters(self) -> TrainingParameters:
        """Length, accumulation, clipping, validation."""
        return self.config.training_parameters

    @property
    def checkpoint_parameters(self) -> CheckpointParameters:
        """Triggers, retention, resume."""
        return self.config.checkpoint_parameters

    @property
    def is_accumulating_gradients(self) -> bool:
        """Whether the batch under way does not end its accumulation window."""
        return self.window.is_accumulating

    @property
    def is_in_step(self) -> bool:
        """Whether a batch is inside ``training_step``, so that the state is between two."""
        return self.window.is_in_batch

    @property
    def num_train_batches(self) -> int | None:
        """Batches of a training epoch on this rank; None if the loader cannot tell."""
        return self._adopted_train_loader().num_batches

    @property
    def num_training_steps(self) -> int:
        """Optimizer steps of the whole run, for learning-rate schedules.

        Raises:
            ConfigError: neither ``max_steps`` nor ``n_epochs`` and a loader of known length say.
        """
        loader = self._adopted_train_loader()
        parameters, dp_size = self.training_parameters, self.world.dp_size
        scheduler = accumulation_scheduler(self.callbacks)
        return count_training_steps(loader, parameters, dp_size, scheduler)

    @property
    def run_directory(self) -> Path:
        """Where the run is on disk. Known once the run is launched."""
        config = self.config
        assert config.experiment is not None, "the run has no name before it is launched"
        return Path(config.root_dir) / config.project / config.group / config.experiment

    @property
    def writes_run_directory(self) -> bool:
        """Whether this run leaves anything on disk."""
        return self.checkpoint_parameters.enable

    @property
    def sync_modules(self) -> Sequence[nn.Module]:
        """The modules whose forward is called, as the strategy wrapped them."""
        return list(self.named_models().values())

    # ------------------------------------------------------------------ state

    def get_module(self, fqn: str) -> nn.Module:
        """The module at ``"model.path.to.module"``.

        Raises:
            UnknownComponentError: there is none; the message names what exists.
        """
        return find_module(self.named_models(), fqn)

    def state_dict(self) -> dict[str, Any]:
        """Everything the next step depends on: nested plain data and tensors.

        Models and optimizers are keyed by parameter name, the same under every strategy. Tensors
        are the live ones, not copies. Call it on every rank, between two batches. Rows of the
        metrics log that are pending are written first.

        Raises:
            RuntimeError: inside ``training_step``, or between the batches of a validation.
            NonFiniteError: a pending loss or gradient norm is not finite.
        """
        self.prepare()
        return gather_state(self)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> None:
        """Continue from what `state_dict` gave, under any strategy. It is not changed.

        Args:
            state_dict: nested plain data and tensors, sharded or not.
            strict: refuse a state that does not fit in every part, and load nothing. If False,
                what fits is loaded and the rest is listed in a warning.

        Raises:
            StateError: listing everything that does not fit, with its path.
        """
        self.prepare()
        apply_state(self, state_dict, strict)
        self._is_restored = self.is_resumed = True
        self.streams.lay_aside()

    def first_nonfinite(self) -> str | None:
        """Name of a parameter, or optimizer state, that is NaN or infinite. A collective."""
        return first_nonfinite(self)

    def checked_state_dict(self) -> dict[str, Any]:
        """`state_dict`, if it may be saved as good.

        Raises:
            NonFiniteError: on every rank, if something on any rank is not finite.
        """
        state = self.state_dict()
        check_finite(self)
        return state

    # ------------------------------------------------------------------ lifecycle

    def prepare(self) -> None:
        """Launch, seed, configure and set up, once. Everything that needs components calls it."""
        if self.is_prepared:
            return
        callbacks = self.callbacks
        callbacks.pre_launch(self)
        self.world.launch()
        if self.is_running:
            self.watch.join(self.world)
        self.place.enter("configure")
        # A copy: another trainer with the same configuration gets a seed and a name of its own.
        self.config = config = copy.copy(self.config)
        # Drawn or named on rank 0: on its own each rank would come up with another.
        if config.experiment is None:
            from dream_trainer.world.launchers import job_id

            job = job_id(self.world.ranks)
            config.experiment = fresh_experiment_name(job, next(_runs_without_name))
        if config.seed is None:
            config.seed = recorded_or_new_seed(self.run_directory, self.checkpoint_parameters)
        config.seed, config.experiment = self.world.broadcast((config.seed, config.experiment))
        seed_everything(self.seed)
        callbacks.pre_configure(self)
        self.configure()
        callbacks.post_configure(self)
        self.place.enter("setup")
        callbacks.pre_setup(self)
        self.setup()
        self._bind()
        self.is_prepared = True
        callbacks.post_setup(self)

    @property
    def seed(self) -> int:
        """Seed of the run. Known once the run is launched, if the configuration has none."""
        assert self.config.seed is not None, "the run has no seed before it is launched"
        return self.config.seed

    def _bind(self) -> None:
        """Look up once what every step needs."""
        self.components = Components.of(
            self.named_models(), self.named_optimizers(), self.named_schedulers()
        )
        self.frozen_weights = FrozenWeights(self.components)
        skips = self.training_parameters.on_nonfinite == "skip"
        self.guard = StepGuard(self) if skips else None
        self.scheduler_steps = SchedulerSteps(self)
        self._optimizer_steps = OptimizerSteps(self, self.scheduler_steps, self.guard)
        self._backward = self.world.backward_function()
        self.lock = RunLock(self.run_directory)
        self.checkpointer = checkpointing.Checkpointer(
            self.run_directory / "checkpoints", self.world, self.checkpoint_parameters
        )
        dp_size, val = self.world.dp_size, self.val_dataloader
        train = self._adopt(self.train_dataloader, "train_dataloader")
        size = largest = self.training_parameters.accumulation(train.batch_size, dp_size)
        if (scheduler := accumulation_scheduler(self.callbacks)) is not None:
            scheduler.check(self.training_parameters)
            largest = max(size, *scheduler.scheduling.values())
        train.looks_ahead = largest > 1  # a window must know its last batch
        self.window = AccumulationWindow(size, dp_size, self._sum_over_data_parallel)
        val = None if val is None else self._adopt(val, "val_dataloader")
        self.loop = FitLoop(self, train, val, self.window, self.clock)

    def forget_setup(self) -> None:
        """Let go of what `prepare` has bound to the models as they are wrapped."""
        if self.is_prepared:
            del self._optimizer_steps, self._backward
            self.guard = None
            self.window = AccumulationWindow(1, 1, _on_its_own)

    def release(self) -> None:
        """Wait for the save under way, report it if it failed; end workers, let others in."""
        if self.is_prepared:
            try:
                self.checkpointer.report(wait=True)
                self.loop.close()
            finally:
                self.lock.release()

    def _restore(self, *, read_only: bool = True) -> None:
        """Once: continue from a checkpoint, if there is one."""
        if not self._is_restored:
            self.place.enter("restore")
            restore(self, read_only=read_only)
            self._is_restored = True

    @contextmanager
    def _evaluation(self, purpose: str, checkpoint: str | Path | None) -> Iterator[None]:
        """What surrounds a validation, test or prediction that somebody asks for."""
        with evaluating_inside(self) if self.is_running else running(self):
            self.prepare()
            if checkpoint is None:
                self._restore()
                yield
            else:
                # Only for those who ask for it.
                from dream_trainer.trainer.on_checkpoint import weights_of

                with weights_of(self, checkpoint, purpose):
                    yield

    def _adopt(self, loader: Any, name: str) -> ResumableLoader:
        parameters = self.training_parameters
        return adopt_loader(loader, name, self.world, self.seed, parameters, self._loaders)

    def _adopted_train_loader(self) -> ResumableLoader:
        if self.is_prepared:
            return self.loop.train_loader
        return self._adopt(self.train_dataloader, "train_dataloader")  # setup has no loop yet

    def _loader_of(self, given: Iterable[Any] | None, phase: Literal["test", "predict"]) -> Any:
        made = getattr(self, f"{phase}_dataloader")() if given is None else given
        if made is None:
            raise ConfigError(
                phase,
                [f"{type(self).__name__} has no {phase}_dataloader"],
                f"Write that method, or call {phase}(loader).",
            )
        return made

    @property
    def _has_summary(self) -> bool:
        """Whether a callback says how the run starts and ends."""
        return any(isinstance(self.callbacks[name], RunSummary) for name in self.callbacks)

    def _sum_over_data_parallel(self, total: Tensor) -> Tensor:
        if self.world.dp_size == 1:
            return total
        # Ranks that share samples add the same number, so the sum is too large by their count.
        summed: Tensor = self.world.all_reduce(total, op="sum")
        return summed / self.world.tp_size


def _on_its_own(total: Tensor) -> Tensor:
    return total
