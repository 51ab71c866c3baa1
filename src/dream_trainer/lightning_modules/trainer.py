"""LightningModuleTrainer: somebody's LightningModule, unchanged, on this package's loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dream_trainer import world
from dream_trainer.data import ResumableLoader
from dream_trainer.errors import ConfigError
from dream_trainer.lightning_modules.attached import (
    AttachedTrainer,
    attached,
    optimizer_for_module,
)
from dream_trainer.lightning_modules.journal import Journal, ModulePhases
from dream_trainer.lightning_modules.module_data import ModuleData
from dream_trainer.lightning_modules.module_hooks import ModuleHooks
from dream_trainer.lightning_modules.schedules import Schedule, optimizers_and_schedules
from dream_trainer.lightning_modules.support import (
    num_arguments,
    own_hooks,
    plain_values,
    require_supported,
)
from dream_trainer.trainer.base import BaseTrainer, BaseTrainerConfig
from dream_trainer.trainer.loaders import accumulation_scheduler
from dream_trainer.world.gradient_sync import ManualBackward
from dream_trainer.world.wrappers import unwrap


@dataclass(kw_only=True)
class LightningModuleTrainerConfig(BaseTrainerConfig):
    """The configuration of a `LightningModuleTrainer`; the module brings its own."""


class LightningModuleTrainer(BaseTrainer):
    """Runs a LightningModule as it is, exactly resumable, under every strategy.

    Its hooks, ``self.log``, ``self.trainer``, ``self.optimizers()`` and schedules work as under
    Lightning's Trainer. What does not is refused, by name, before the run starts.

    Args:
        config: the run's configuration.
        module: the LightningModule.
        datamodule: a LightningDataModule; its loaders come before the module's own.
        train_dataloader: comes before both.
        val_dataloader: likewise.
        fabric: a ``Fabric`` to run on, launched already or not.

    Raises:
        ConfigError: something of the module is not supported; all of it is named.
    """

    config: LightningModuleTrainerConfig

    def __init__(
        self,
        config: LightningModuleTrainerConfig,
        module: Any,
        datamodule: Any = None,
        *,
        train_dataloader: Iterable[Any] | None = None,
        val_dataloader: Iterable[Any] | None = None,
        fabric: world.Fabric | None = None,
    ) -> None:
        super().__init__(config, fabric=fabric)
        require_supported(
            module,
            datamodule,
            config.device_parameters,
            is_sharded=isinstance(self.world.strategy, world.MeshStrategy),
            scales_loss=self.world.scales_loss,
        )
        self.module, self.datamodule = module, datamodule
        self._own = frozenset(own_hooks(module))
        self._num_arguments: dict[str, int | None] = {}
        self.journal = Journal(self)
        self.metrics = ModulePhases(self)
        self.attached_trainer, self.is_attached = AttachedTrainer(self), False
        self.callbacks = self.callbacks.preceded_by("lightning_module", ModuleHooks(self))
        self.schedules: list[Schedule] = []
        self.outputs: Any = None
        self.clips_itself = "configure_gradient_clipping" in self._own
        self.gradient_clip_val = self.training_parameters.gradient_clip_val
        given = {"train": train_dataloader, "val": val_dataloader}
        self._data = ModuleData(module, datamodule, given)
        self._wrapped: nn.Module | None = None
        self._train_loader: ResumableLoader | None = None
        self._val_loader: ResumableLoader | None = None
        self._optimizers: dict[str, Optimizer] = {}
        self.optimizers_for_module: list[Optimizer] = []
        self._manual: ManualBackward | None = None

    # ------------------------------------------------------------------ what users call

    def fit(self) -> None:
        """Train; see `BaseTrainer.fit`."""
        with self._running("fit"):
            super().fit()

    def validate(self, checkpoint: str | Path | None = None) -> dict[str, float]:
        """Validate once; see `BaseTrainer.validate`."""
        with self._running("validate"):
            return super().validate(checkpoint)

    def test(
        self, dataloader: Iterable[Any] | None = None, *, checkpoint: str | Path | None = None
    ) -> dict[str, float]:
        """Run ``test_step``; see `BaseTrainer.test`."""
        if "test_step" not in self._own:
            raise ConfigError(type(self.module).__name__, ["test_step is not written"])
        with self._running("test"):
            return super().test(dataloader, checkpoint=checkpoint)

    def predict(
        self,
        dataloader: Iterable[Any] | None = None,
        *,
        checkpoint: str | Path | None = None,
        return_predictions: bool = True,
    ) -> list[Any]:
        """Run ``predict_step``; see `BaseTrainer.predict`."""
        with self._running("predict"):
            return super().predict(
                dataloader, checkpoint=checkpoint, return_predictions=return_predictions
            )

    @contextmanager
    def _running(self, stage: str) -> Iterator[None]:
        if self.world.starts_functions:
            yield  # the module is found by the ranks' own trainers
            return
        with attached(self, stage):
            try:
                yield
            except BaseException as error:
                if self.datamodule is not None:
                    self.datamodule.on_exception(error)
                raise
            finally:
                self._data.tear_down(stage)

    # ------------------------------------------------------------------ contract

    def configure(self) -> None:
        """Data, ``setup`` and ``configure_model``."""
        with attached(self, self.attached_trainer.stage):
            self._data.prepare(self.world)
            self._data.set_up("fit")
            self.call("configure_model")

    def setup(self) -> None:
        """Place the module, then make loaders, optimizers and schedules."""
        with attached(self, self.attached_trainer.stage):
            if self.clips_itself:
                self.config.training_parameters = dataclasses.replace(
                    self.training_parameters, gradient_clip_val=None
                )
            self._wrapped = self.world.setup(self.module)
            self.module.fabric = None  # with one, the module would ask it instead of its trainer
            self._train_loader = self._data.loader("train")
            if self._train_loader is None:
                raise ConfigError(
                    type(self.module).__name__,
                    ["there is no train_dataloader"],
                    "Write one in the module or in a data module, or pass it.",
                )
            if "validation_step" in self._own:
                self._val_loader = self._data.loader("val")
            made, self.schedules = optimizers_and_schedules(self.module.configure_optimizers())
            self._require_steppable(made)
            names = ["optimizer"]
            if len(made) != 1:
                names = [f"optimizer_{index}" for index in range(len(made))]
            self._optimizers = {
                name: self.world.setup_optimizer(one) for name, one in zip(names, made, strict=True)
            }
            self.optimizers_for_module = [
                optimizer_for_module(one, partial(self._step_of_module, name), self._toggled)
                for name, one in zip(names, made, strict=True)
            ]
            if not self.module.automatic_optimization:
                self._manual = ManualBackward(self._wrapped)

    def named_models(self) -> Mapping[str, nn.Module]:
        """The module, as ``"module"``."""
        return {"module": self.module}

    def named_optimizers(self) -> Mapping[str, Optimizer]:
        """``"optimizer"``, or ``"optimizer_0"`` and so on."""
        return self._optimizers

    def named_schedulers(self) -> None:
        """None: schedules step when the module says."""
        return

    def schedulers_of(self, optimizer: Optimizer) -> list[Any]:
        """Those of the module's schedules that drive an optimizer."""
        every = (schedule.scheduler for schedule in self.schedules)
        return [one for one in every if unwrap(one.optimizer) is unwrap(optimizer)]

    @property
    def sync_modules(self) -> Sequence[nn.Module]:
        """The wrapped module."""
        assert self._wrapped is not None
        return [self._wrapped]

    @property
    def train_dataloader(self) -> ResumableLoader:
        """Of the arguments, the data module, or the module."""
        assert self._train_loader is not None
        return self._train_loader

    @property
    def val_dataloader(self) -> ResumableLoader | None:
        """Likewise, if there is a ``validation_step``."""
        return self._val_loader

    def test_dataloader(self) -> Any:
        """Of the data module, or the module."""
        return self._data.loader("test")

    def predict_dataloader(self) -> Any:
        """Of the data module, or the module."""
        return self._data.loader("predict")

    # ------------------------------------------------------------------ steps

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """A module's ``training_step`` with everything around it."""
        loss = self._train_on(batch, batch_idx)
        # One that the module logs itself would be averaged with it.
        return None if "train/loss" in self.journal.latest else loss

    def _train_on(self, batch: Any, batch_idx: int) -> Tensor | None:
        journal, module = self.journal, self.module
        journal.batch, journal.is_in_step = batch, True
        if self.call("on_train_batch_start", batch, batch_idx) == -1:
            raise RuntimeError(
                f"{type(module).__name__}.on_train_batch_start returned -1, to skip the rest of "
                "the epoch. Limit it with training_parameters.train_steps_per_epoch, or set "
                "self.trainer.should_stop = True."
            )
        if self._manual is not None:
            with self._manual.forward(), self.world.precision_context():
                batch = self.world.to_precision(batch)
                self.outputs = self._called(module, "training_step", batch, batch_idx)
            return self._loss_of(self.outputs)
        forward = partial(self._forward_and_backward, batch, batch_idx)
        if self.is_accumulating_gradients or not self._optimizers:
            return forward()
        if "optimizer_step" not in self._own:
            loss = forward()
            if loss is not None:
                self.step()
            return loss
        (optimizer,) = self.optimizers_for_module
        # Lightning counts the step when this hook is over, and schedules in it are written so.
        self.attached_trainer.steps_before = self.global_step
        try:
            module.optimizer_step(self.current_epoch, batch_idx, optimizer, forward)
        finally:
            self.attached_trainer.steps_before = None
        return self._loss_of(self.outputs)

    def _forward_and_backward(self, batch: Any, batch_idx: int) -> Tensor | None:
        if "optimizer_step" in self._own and not self.progress.num_batches_in_window:
            for optimizer in self._optimizers.values():  # a hook may have taken no step
                optimizer.zero_grad()
        self.outputs = self._called(self._wrapped, "training_step", batch, batch_idx)
        loss = self._loss_of(self.outputs)
        if loss is None:
            return None
        self.call("on_before_backward", loss)
        if "backward" in self._own:
            scaled, factor = self.window.weighted(loss, None)
            self.module.backward(scaled * factor)
        else:
            self.backward(loss)
        self.call("on_after_backward")
        return loss.detach()

    def _loss_of(self, outputs: Any) -> Tensor | None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        is_manual = self._manual is not None
        if isinstance(loss, Tensor) or loss is None:
            return None if is_manual and loss is not None and loss.numel() != 1 else loss
        raise TypeError(
            f"{type(self.module).__name__}.training_step returned a {type(outputs).__name__}; "
            "return a loss, a dict with 'loss' in it, or None"
        )

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """A module's ``validation_step`` with its hooks; what it logs is the result."""
        self._evaluation_step("validation", batch, batch_idx)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """A module's ``test_step`` with its hooks."""
        self._evaluation_step("test", batch, batch_idx)

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        """A module's ``predict_step`` with its hooks."""
        return self._evaluation_step("predict", batch, batch_idx)

    def _evaluation_step(self, kind: str, batch: Any, batch_idx: int) -> Any:
        self.journal.batch = batch
        self.call(f"on_{kind}_batch_start", batch, batch_idx)
        outputs = self._called(self._wrapped, f"{kind}_step", batch, batch_idx)
        self.call(f"on_{kind}_batch_end", outputs, batch, batch_idx)
        return outputs

    def export_example(self, batch: Any) -> Any:
        """The module's ``example_input_array``."""
        example = getattr(self.module, "example_input_array", None)
        return super().export_example(batch) if example is None else example

    def batch_to_device(self, batch: Any) -> Any:
        """With the module's, or data module's, own transfer hooks."""
        return self._data.to_device(batch, self.world)

    @property
    def moves_batches(self) -> bool:
        """Whether something is to be moved, or a hook has something to do."""
        return self.world.moves_batches or self._data.has_transfer_hooks

    # ------------------------------------------------------------------ what the module asks for

    def call(self, name: str, *arguments: Any) -> Any:
        """Call a hook of the module, if it has one of its own."""
        return self._called(self.module, name, *arguments) if name in self._own else None

    def manual_backward(self, loss: Tensor) -> None:
        """What ``self.manual_backward`` does."""
        assert self._manual is not None
        self._manual.prepare(loss)
        self.world.backward(loss)

    def clip_gradients(self, optimizer: Optimizer, **limit: Any) -> None:
        """What ``self.clip_gradients`` does, with an optimizer of any kind that it knows."""
        own = vars(unwrap(optimizer))
        (wrapped,) = (one for one in self._optimizers.values() if vars(unwrap(one)) is own)
        self.world.clip_gradients(wrapped, **limit)

    def callback_metrics(self) -> dict[str, Any]:
        """Newest values that the module has logged, by name."""
        return self.journal.callback_metrics()

    def evaluates(self, phase: str) -> bool:
        """Whether an evaluation of that kind is under way."""
        return self.is_evaluating and self.journal.phase == phase

    @property
    def is_evaluating(self) -> bool:
        """Whether a validation, test or prediction is under way."""
        return self.is_prepared and self.loop.is_evaluating

    def hyper_parameters(self) -> dict[str, Any]:
        """What ``save_hyperparameters`` keeps of the module, as far as it is plain data."""
        return plain_values(getattr(self.module, "hparams", None) or {})

    def hyperparameters(self) -> dict[str, Any]:
        """Also those of the data module and of the module, unless they say ``logger=False``."""
        found = super().hyperparameters()
        for one in (self.datamodule, self.module):
            if getattr(one, "_log_hyperparams", False):
                found |= dict(getattr(one, "hparams_initial", None) or {})
        return found

    def additions(self) -> dict[str, Any]:
        """What ``on_save_checkpoint`` puts into a checkpoint."""
        with attached(self, self.attached_trainer.stage):
            checkpoint = self._checkpoint()
            known = set(checkpoint)
            self.call("on_save_checkpoint", checkpoint)
        return {name: value for name, value in checkpoint.items() if name not in known}

    def take_additions(self, additions: Mapping[str, Any]) -> None:
        """Give them to ``on_load_checkpoint``."""
        with attached(self, self.attached_trainer.stage):
            self.call("on_load_checkpoint", {**self._checkpoint(), **additions})

    @property
    def has_validation_hooks(self) -> bool:
        """Also those of the module."""
        own = {"on_validation_start", "on_validation_epoch_start"}.intersection(self._own)
        return bool(own) or super().has_validation_hooks

    def forget_setup(self) -> None:
        """Also what manual optimization holds."""
        self._manual = None
        super().forget_setup()

    # ------------------------------------------------------------------ inside

    def _checkpoint(self) -> dict[str, Any]:
        return {
            "epoch": self.current_epoch,
            "global_step": self.global_step,
            "state_dict": self.module.state_dict() if self._has_checkpoint_hooks else {},
            "hyper_parameters": self.hyper_parameters(),
        }

    @property
    def _has_checkpoint_hooks(self) -> bool:
        return bool({"on_save_checkpoint", "on_load_checkpoint"}.intersection(self._own))

    def _called(self, module: Any, name: str, *arguments: Any) -> Any:
        """Call a method with as many arguments as it takes.

        Of the wrapped module it runs through precision and strategy, as ``forward`` does.
        """
        if name not in self._num_arguments:
            # Once: a signature takes longer than most hooks.
            self._num_arguments[name] = num_arguments(getattr(self.module, name))
        return getattr(module, name)(*arguments[: self._num_arguments[name]])

    def _step_of_module(self, name: str, closure: Any = None, **options: Any) -> Any:
        """What ``step`` of ``self.optimizers()`` does."""
        if options:
            raise TypeError(f"step takes a closure alone here, got {', '.join(options)}")
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        if self._manual is not None or result is not None or closure is None:
            self.step(name)
        return result

    @contextmanager
    def _toggled(self, optimizer: Optimizer, sync_grad: bool) -> Iterator[None]:
        with self.world.accumulate(self.sync_modules, enabled=not sync_grad):
            self.module.toggle_optimizer(optimizer)
            yield
            self.module.untoggle_optimizer(optimizer)

    def _require_steppable(self, optimizers: list[Optimizer]) -> None:
        parameters, problems = self.training_parameters, []
        if self.module.automatic_optimization:
            if len(optimizers) > 1:
                problems.append(
                    f"configure_optimizers returned {len(optimizers)} optimizers; several need "
                    "automatic_optimization=False"
                )
        else:
            by_epoch = accumulation_scheduler(self.callbacks)
            if parameters.gradient_accumulation_steps not in (None, 1) or by_epoch is not None:
                problems.append("automatic_optimization=False accumulates gradients by itself")
            if parameters.gradient_clip_val is not None:
                problems.append(
                    "automatic_optimization=False clips by itself: self.clip_gradients(optimizer, "
                    "0.5, 'norm')"
                )
        if problems:
            raise ConfigError(type(self.module).__name__, problems)


__all__ = ["LightningModuleTrainer", "LightningModuleTrainerConfig"]
