"""BaseTrainer: the run. Launch, configure, setup, restore, loop, close."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from dream_trainer import checkpointing, world
from dream_trainer.accumulation import Weight, no_loss
from dream_trainer.callbacks import CallbackList
from dream_trainer.callbacks.overview import Overview
from dream_trainer.configs import CheckpointParameters, Link, TrainingParameters
from dream_trainer.configs.differing import flattened
from dream_trainer.configs.yaml_text import load_yaml
from dream_trainer.errors import ConfigError
from dream_trainer.host_values import Value
from dream_trainer.loggers import Logger
from dream_trainer.loop import FitLoop
from dream_trainer.measured import MeasuredValues
from dream_trainer.metrics import LoggedValues
from dream_trainer.reductions import Reduce
from dream_trainer.storage.run_lock import RunLock
from dream_trainer.trainer import evaluation, fitting, preparation, state
from dream_trainer.trainer.abstract import AbstractTrainer
from dream_trainer.trainer.closing import close
from dream_trainer.trainer.components import Components, copy_of_unsharded, find_module
from dream_trainer.trainer.default_callbacks import callbacks_of_a_run
from dream_trainer.trainer.frozen_weights import FrozenWeights
from dream_trainer.trainer.loaders import AdoptedLoaders
from dream_trainer.trainer.metric_phases import MetricPhases
from dream_trainer.trainer.monitored import Monitored
from dream_trainer.trainer.nonfinite import StepGuard
from dream_trainer.trainer.optimizer_steps import OptimizerSteps
from dream_trainer.trainer.presets import Preset, debug, overfit
from dream_trainer.trainer.run_directory import config_yaml
from dream_trainer.trainer.run_streams import RunStreams
from dream_trainer.trainer.scheduler_steps import SchedulerSteps
from dream_trainer.trainer.trainer_config import BaseTrainerConfig

if TYPE_CHECKING:
    from plotly.graph_objects import Figure
    from typing_extensions import Self

__all__ = ["BaseTrainer", "BaseTrainerConfig"]


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
        adopted_loaders: the loaders that are attached to the ranks.
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
        is_restored: whether the run has looked for what it continues from.
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
        self.callbacks = CallbackList(
            callbacks_of_a_run(config.callbacks), foreign=self.world.callbacks
        )
        self.loggers: dict[str, Logger] = {
            name: one for name, one in config.loggers.items() if one is not None
        }
        for index, one in enumerate(self.world.loggers):
            self.loggers.setdefault(f"fabric_{index}", one)
        self.metrics = MetricPhases(self)
        self.logged, self.measured = LoggedValues(), MeasuredValues()
        self.began = 0.0
        self.resumed_from: str | None = None
        self.monitored = Monitored(self)
        self.is_running = self.is_fitting = self.is_resumed = False
        self.is_interrupted_between_batches = False
        self.is_brought_back = self.is_closed = False
        self.stop_reason: str | None = None
        self.origin = ""
        self.place, self.watch, self.interruption = preparation.connected(config)
        self.validation_results: Mapping[str, float] = {}
        self.describe_config: Callable[[Any], str] = config_yaml
        self.is_prepared = self.is_restored = False
        self.streams = RunStreams(self.progress)
        self.adopted_loaders = AdoptedLoaders(self)
        self.window = preparation.window_of_one()
        self.guard: StepGuard | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Locks cannot be sent to a spawned rank, which makes its own.
        return {n: v for n, v in vars(self).items() if n not in ("place", "watch", "interruption")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.place, self.watch, self.interruption = preparation.connected(self.config)

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
        fitting.fit(self)

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
        return evaluation.validate(self, checkpoint)

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
        return evaluation.test(self, dataloader, checkpoint)

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
        return evaluation.predict(self, dataloader, checkpoint, return_predictions)

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
        return evaluation.export(self, path, checkpoint, options)

    def summary(self, depth: int = 1) -> Overview:
        """What `fit` is about to do: ``print(trainer.summary())``. Nothing is loaded or written.

        Every rank calls it: it launches and sets up.

        Args:
            depth: levels of modules below each model.
        """
        return evaluation.summary(self, depth)

    def backward(self, loss: Tensor, weight: Weight | None = None) -> None:
        """Backward pass, scaled so that the step's gradient is a mean over its window.

        Args:
            loss: mean over the samples of the batch; a scalar.
            weight: how much the batch counts, the number of its tokens for example. The step's
                gradient is then the weighted mean over the window and all data-parallel ranks.
        """
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise no_loss(loss)
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
        self.logged.log({name: value}, reduce, weight)

    def log_dict(
        self,
        values: Mapping[str, Value],
        *,
        reduce: Reduce = "mean",
        weight: Value | None = None,
    ) -> None:
        """Log values with the step under way; see `log`."""
        self.logged.log(values, reduce, weight)

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
        step, epoch = self.global_step, self.current_epoch
        self.checkpointer.write(path, self.checked_state_dict(), step=step, epoch=epoch)

    def load_checkpoint(self, path: str | Path, strict: bool = True) -> None:
        """Continue from a checkpoint directory, whatever strategy and ranks wrote it.

        Raises:
            CheckpointError: it is damaged, unsafe or of another format.
            StateError: it does not fit.
        """
        self.prepare()
        loaded = self.checkpointer.load(path, self.components.template())
        self.load_state_dict(state.OwnState(loaded.state), strict)
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
        return self.adopted_loaders.train.num_batches

    @property
    def num_training_steps(self) -> int:
        """Optimizer steps of the whole run, for learning-rate schedules.

        Raises:
            ConfigError: neither ``max_steps`` nor ``n_epochs`` and a loader of known length say.
        """
        return self.adopted_loaders.num_training_steps

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
        return state.gather_state(self)

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
        state.apply_state(self, state_dict, strict)
        self.is_restored = self.is_resumed = True
        self.streams.lay_aside()

    def first_nonfinite(self) -> str | None:
        """Name of a parameter, or optimizer state, that is NaN or infinite. A collective."""
        return state.first_nonfinite(self)

    def checked_state_dict(self) -> dict[str, Any]:
        """`state_dict`, if it may be saved as good.

        Raises:
            NonFiniteError: on every rank, if something on any rank is not finite.
        """
        whole = self.state_dict()
        state.check_finite(self)
        return whole

    # ------------------------------------------------------------------ lifecycle

    def prepare(self) -> None:
        """Launch, seed, configure and set up, once. Everything that needs components calls it."""
        if not self.is_prepared:
            preparation.prepare(self, self._bind)

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
        adopt, val = self.adopted_loaders.adopt, self.val_dataloader
        train = adopt(self.train_dataloader, "train_dataloader")
        self.window = preparation.window_over(self, train)
        val = None if val is None else adopt(val, "val_dataloader")
        self.loop = FitLoop(self, train, val, self.window, self.clock)

    def forget_setup(self) -> None:
        """Let go of what `prepare` has bound to the models as they are wrapped."""
        if self.is_prepared:
            del self._optimizer_steps, self._backward
            self.guard = None
            self.window = preparation.window_of_one()

    def release(self) -> None:
        """Wait for the save under way, report it if it failed; end workers, let others in."""
        if self.is_prepared:
            preparation.release(self)
