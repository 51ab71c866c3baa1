"""The ``self.trainer`` of a LightningModule that runs here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dream_trainer.world.wrappers import unwrap

if TYPE_CHECKING:
    from dream_trainer.lightning_modules.trainer import LightningModuleTrainer


class AttachedTrainer:
    """What modules read of Lightning's Trainer, answered by this package's.

    Args:
        run: the trainer that runs the module.
    """

    def __init__(self, run: LightningModuleTrainer) -> None:
        self._run = run
        self.strategy = _Strategy(run)
        self.precision_plugin = _Precision(run)
        self.stage = "fit"
        self.steps_before: int | None = None
        self.progress_bar_callback = None
        self.barebones = False
        self.fast_dev_run = False

    # where the run is
    @property
    def current_epoch(self) -> int:
        return self._run.current_epoch

    @property
    def global_step(self) -> int:
        return self._run.global_step if self.steps_before is None else self.steps_before

    @property
    def max_epochs(self) -> int | None:
        n_epochs = self._run.training_parameters.n_epochs
        return -1 if n_epochs is None else n_epochs

    @property
    def max_steps(self) -> int:
        max_steps = self._run.training_parameters.max_steps
        return -1 if max_steps is None else max_steps

    @property
    def estimated_stepping_batches(self) -> int:
        return self._run.num_training_steps

    @property
    def num_training_batches(self) -> int | float:
        count = self._run.num_train_batches
        return float("inf") if count is None else count

    @property
    def is_last_batch(self) -> bool:
        return self._run.loop.train_loader.is_last is True

    @property
    def should_stop(self) -> bool:
        return self._run.stop_reason is not None

    @should_stop.setter
    def should_stop(self, value: bool) -> None:
        if value:
            self._run.stop("trainer.should_stop was set")

    training = property(lambda self: self.stage == "fit" and not self._run.is_evaluating)
    validating = property(lambda self: self.stage == "validate" or self._run.evaluates("val"))
    sanity_checking = property(lambda self: self._run.evaluates("sanity"))
    testing = property(lambda self: self.stage == "test")
    predicting = property(lambda self: self.stage == "predict")

    # where it runs
    world_size = property(lambda self: self._run.world.size)
    num_devices = property(lambda self: self._run.world.size // self.num_nodes)
    num_nodes = property(lambda self: self._run.config.device_parameters.num_nodes)
    global_rank = property(lambda self: self._run.world.rank)
    local_rank = property(lambda self: self._run.world.local_rank)
    node_rank = property(lambda self: self._run.world.node_rank)
    is_global_zero = property(lambda self: self._run.world.is_global_zero)
    precision = property(lambda self: self._run.world.precision)

    # what it runs
    lightning_module = model = property(lambda self: self._run.module)
    datamodule = property(lambda self: self._run.datamodule)
    train_dataloader = property(lambda self: self._run.train_dataloader)
    val_dataloaders = property(lambda self: self._run.val_dataloader)
    optimizers = property(
        lambda self: [unwrap(one) for one in self._run.named_optimizers().values()]
    )
    lr_scheduler_configs = property(lambda self: self._run.schedules)
    accumulate_grad_batches = property(lambda self: self._run.window.size)
    gradient_clip_val = property(lambda self: self._run.gradient_clip_val)
    gradient_clip_algorithm = property(lambda self: None)

    # what it has found
    callback_metrics = property(lambda self: self._run.callback_metrics())
    logged_metrics = progress_bar_metrics = callback_metrics
    loggers = property(lambda self: list(self._run.loggers.values()))
    logger = property(lambda self: next(iter(self._run.loggers.values()), None))
    default_root_dir = property(lambda self: str(self._run.config.root_dir))
    log_dir = property(lambda self: str(self._run.run_directory))

    def print(self, *arguments: Any, **options: Any) -> None:
        self._run.world.print(*arguments, **options)

    def __getattr__(self, name: str) -> Any:
        known = ", ".join(sorted(one for one in dir(type(self)) if one[0] != "_"))
        raise AttributeError(
            f"self.trainer.{name} is not known here. A module can read: {known}. For more, write "
            "the trainer as a DreamTrainer."
        )


class _Strategy:
    """``self.trainer.strategy``, as far as the methods of a LightningModule use it."""

    def __init__(self, run: LightningModuleTrainer) -> None:
        self._run = run

    @property
    def _lightning_optimizers(self) -> list[Optimizer]:
        return self._run.optimizers_for_module

    @property
    def root_device(self) -> torch.device:
        return self._run.world.device

    def backward(self, loss: Tensor, _: None, **options: Any) -> None:
        if options:
            raise TypeError(f"manual_backward takes a loss alone here, got {', '.join(options)}")
        self._run.manual_backward(loss)

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Any:
        if group is not None or sync_grads:
            raise TypeError("all_gather takes no group here, and has no gradients")
        return self._run.world.all_gather(tensor)

    def barrier(self, name: str | None = None) -> None:
        self._run.world.barrier()

    def broadcast(self, value: Any, src: int = 0) -> Any:
        return self._run.world.broadcast(value, src)

    def reduce(self, value: Any, group: Any = None, reduce_op: str = "mean") -> Any:
        return self._run.world.all_reduce(value, op=reduce_op)


class _Precision:
    """``self.trainer.precision_plugin``, which ``self.clip_gradients`` asks."""

    def __init__(self, run: LightningModuleTrainer) -> None:
        self._run = run

    def clip_gradients(self, optimizer: Any, clip_val: float, algorithm: Any) -> None:
        if not clip_val:
            return
        is_norm = getattr(algorithm, "value", algorithm) == "norm"
        limit = {"max_norm": clip_val} if is_norm else {"clip_val": clip_val}
        self._run.clip_gradients(optimizer, **limit)


def optimizer_for_module(optimizer: Optimizer, step: Callable[..., Any], toggled: Any) -> Optimizer:
    """An optimizer as ``self.optimizers()`` gives it: the same one, but the run steps it.

    Args:
        optimizer: with which it shares everything else.
        step: takes the place of its ``step``.
        toggled: makes the context of ``toggle_model``.
    """
    kind = type(optimizer)
    # A property, because schedulers put a ``step`` of theirs into the optimizer itself.
    members = {
        "step": property(lambda self: step),
        "optimizer": property(lambda self: optimizer),
        "toggle_model": lambda self, sync_grad=True: toggled(self, sync_grad),
    }
    made: Optimizer = object.__new__(type(kind.__name__, (kind,), members))
    made.__dict__ = vars(optimizer)
    return made


@contextmanager
def attached(run: LightningModuleTrainer, stage: str) -> Iterator[None]:
    """Let the module, and its data module, find the run; afterwards they are as before."""
    trainer = run.attached_trainer
    before, trainer.stage = trainer.stage, stage
    try:
        with nullcontext() if run.is_attached else _attached(run):
            yield
    finally:
        trainer.stage = before


@contextmanager
def _attached(run: LightningModuleTrainer) -> Iterator[None]:
    module, datamodule, run.is_attached = run.module, run.datamodule, True
    module.trainer = run.attached_trainer
    # On the module itself, in front of the methods of its class.
    own: Mapping[str, Any] = {"log": run.journal.log, "log_dict": run.journal.log_dict}
    vars(module).update(own)
    if datamodule is not None:
        datamodule.trainer = run.attached_trainer
    try:
        yield
    finally:
        run.is_attached, module.trainer = False, None
        for name in own:
            del vars(module)[name]
        if datamodule is not None:
            datamodule.trainer = None
