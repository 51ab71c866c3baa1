"""DreamTrainer: conventions. Say what there is; it is found, named, placed and saved."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dream_trainer import schedules, world
from dream_trainer.data import ResumableLoader
from dream_trainer.errors import ConfigError
from dream_trainer.trainer.base import BaseTrainer
from dream_trainer.trainer.components import copy_of_unsharded
from dream_trainer.trainer.metric_states import is_metric
from dream_trainer.trainer.named_components import (
    holds_modules,
    name_optimizers,
    name_schedules,
    resumable,
    train_and_val,
)
from dream_trainer.trainer.trainer_config import DreamTrainerConfig
from dream_trainer.world.blocks import blocks_of, shard_blocks
from dream_trainer.world.sharded import is_dtensor


class DreamTrainer(BaseTrainer):
    """A trainer that finds what the ``configure_*`` methods make.

    For one model and one optimizer:

        class Classifier(DreamTrainer):
            def configure_models(self):
                self.model = Net()

            def configure_optimizers(self):
                return torch.optim.AdamW(self.model.parameters())

            def configure_dataloaders(self):
                return train_loader, val_loader

            def compute_loss(self, batch, batch_idx):
                x, y = batch
                return F.cross_entropy(self.model(x), y)

    After setup the attributes made by ``configure_models`` hold the wrapped modules, so that
    calling them runs DDP, sharding and precision; `named_models` gives the modules as they
    were made.
    """

    config: DreamTrainerConfig

    def __init__(self, config: DreamTrainerConfig, *, fabric: world.Fabric | None = None) -> None:
        super().__init__(config, fabric=fabric)
        self._models: dict[str, nn.Module] = {}
        self._layers_on_meta: list[nn.Module] = []
        self._wrapped_models: dict[str, nn.Module] = {}
        self._named_optimizers: dict[str, Optimizer] = {}
        self._named_schedules: dict[str, schedules.Schedule] = {}
        self._train_dataloader: Any = None
        self._val_dataloader: Any = None

    # ------------------------------------------------------------------ what users write

    @abstractmethod
    def configure_models(self) -> None:
        """Assign modules to ``self``. Attribute names become the models' names."""

    def init_weights(self) -> None:
        """Initialise the models, if their constructors do not.

        Models made under ``with torch.device("meta")`` get memory once they are sharded, and are
        initialised then: first by the ``reset_parameters`` of their layers, then by this. Write in
        place. Every layout gets the same values, to the bit.
        """

    def configure_metrics(self) -> None:
        """Assign torchmetrics to ``self``.

        Update them in the steps: ``self.accuracy.update(logits, labels)``. Training and validation
        each have their own copy behind the attribute; results are logged as ``train/accuracy`` and
        ``val/accuracy`` at the end of the phase.
        """

    def configure_optimizers(self) -> Any:
        """Make optimizers; models are placed, and sharded, already.

        Returns:
            One optimizer, a list of them, or a mapping from a model (or a name) to one.
        """
        return None

    def configure_schedulers(self) -> Any:
        """Make learning-rate schedulers on `named_optimizers`.

        A scheduler steps after each optimizer step. A `Schedule` around it says something else:
        ``Schedule(scheduler, every="epoch")``.

        Returns:
            One scheduler, a list of them, or a mapping with schedulers as values.
        """
        return None

    @abstractmethod
    def configure_dataloaders(self) -> Any:
        """Make the loaders.

        Returns:
            ``(train, val)``, where ``val`` may be None; or the train loader alone.
        """

    def compute_loss(self, batch: Any, batch_idx: int) -> Tensor | Mapping[str, Any]:
        """The loss of a batch, if neither step is overridden.

        Returns:
            The loss, a mean over the batch; or a mapping with ``"loss"`` and other scalars to
            log. A ``"weight"`` in it (the number of tokens, say) is how much the batch counts, in
            the gradient and in every mean.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has neither compute_loss nor training_step; write one of them"
        )

    # ------------------------------------------------------------------ steps

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """`compute_loss`, backward, step."""
        result = self.compute_loss(batch, batch_idx)
        values = {"loss": result} if isinstance(result, Tensor) else result
        if not isinstance(values, Mapping) or not isinstance(values.get("loss"), Tensor):
            raise TypeError(
                f"compute_loss returned {result!r}; return a loss, or a mapping with 'loss' in it"
            )
        self.backward(values["loss"], values.get("weight"))
        norm = self.step()
        return values if norm is None else {**values, "grad_norm": norm}

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        """`compute_loss`."""
        return self.compute_loss(batch, batch_idx)

    # ------------------------------------------------------------------ policies

    def apply_tensor_parallel(self, model: nn.Module, mesh: DeviceMesh) -> None:
        """Split layers over ``mesh`` (torch's ``parallelize_module``), if asked for.

        Raises:
            ConfigError: always; how a model is split is its author's to say.
        """
        raise ConfigError(
            "device_parameters",
            [
                f"tensor_parallel={mesh.size()}, but {type(self).__name__} does not say how to "
                f"split {type(model).__name__}"
            ],
            "Override apply_tensor_parallel, or set tensor_parallel=1.",
        )

    def apply_activation_checkpointing(self, model: nn.Module) -> None:
        """Recompute the activations of each block of the largest ``ModuleList`` in backward."""
        from torch.distributed.algorithms._checkpoint import checkpoint_wrapper

        blocks = set(map(id, blocks_of(model)))
        checkpoint_wrapper.apply_activation_checkpointing(
            model, check_fn=lambda part: id(part) in blocks
        )

    def apply_compile(self, model: nn.Module) -> None:
        """Compile in place each block of the largest ``ModuleList``, or the model without one."""
        for part in blocks_of(model) or [model]:
            part.compile()

    def apply_fully_shard(self, model: nn.Module, **fsdp_arguments: Any) -> None:
        """Shard each block of the largest ``ModuleList``, then the model.

        Args:
            model: the module.
            **fsdp_arguments: ``mesh``, ``mp_policy`` and ``offload_policy`` of torch's
                ``fully_shard``, as the device parameters ask for.
        """
        shard_blocks(model, **fsdp_arguments)

    # ------------------------------------------------------------------ contract

    def configure(self) -> None:
        """Make models and metrics, and find them."""
        from dream_trainer.world.materialize import layers_on_meta

        before = dict(vars(self))
        self.configure_models()
        found = {n: v for n, v in vars(self).items() if before.get(n) is not v}
        metrics = {n: v for n, v in found.items() if is_metric(v)}
        self._models = {
            name: value
            for name, value in found.items()
            if isinstance(value, nn.Module) and name not in metrics
        }
        hidden = [
            f"self.{name} is a {type(value).__name__} of modules, which would not be trained"
            for name, value in found.items()
            if name not in metrics and holds_modules(value)
        ]
        if hidden:
            raise ConfigError("configure_models", hidden, "Use ModuleList or ModuleDict.")
        if not self._models:
            raise ConfigError(
                "configure_models", ["it assigned no module to self"], "Write self.model = Net()."
            )
        self._layers_on_meta = [
            layer for model in self._models.values() for layer in layers_on_meta(model)
        ]
        if not self._layers_on_meta:
            self.init_weights()
        before = dict(vars(self))
        self.configure_metrics()
        metrics |= {
            name: value
            for name, value in vars(self).items()
            if before.get(name) is not value and is_metric(value)
        }
        self.metrics.adopt(metrics)

    def setup(self) -> None:
        """Place models, then make what needs them placed: loaders, optimizers, schedulers."""
        self._wrapped_models = {
            name: self.world.setup(
                self._with_policies(model), parallelize=self._parallelize, initialize=False
            )
            for name, model in self._models.items()
        }
        if self._layers_on_meta:
            self.world.initialize(self._models, self._layers_on_meta, self.init_weights)
        loaders = self.configure_dataloaders()
        train, val = train_and_val(loaders)
        self._train_dataloader = resumable(train)
        self._val_dataloader = None if val is None else resumable(val)
        made = name_optimizers(self.configure_optimizers(), self._models)
        # Their schedulers are made on the optimizers as they are: wrapped ones are new objects.
        self._named_optimizers = made
        schedulers = self.configure_schedulers()
        self._named_schedules = name_schedules(schedulers, self.get_name_by_optimizer)
        self._named_optimizers = {
            name: self.world.setup_optimizer(optimizer) for name, optimizer in made.items()
        }
        self._rebind(self._models, self._wrapped_models)
        self._rebind(made, self._named_optimizers)

    def named_models(self) -> Mapping[str, nn.Module]:
        """Name -> model as it was made; call the attribute, not this, to run it."""
        return self._models

    def named_optimizers(self) -> Mapping[str, Optimizer]:
        """Name -> optimizer. An optimizer is named after the models it trains."""
        return self._named_optimizers

    def named_schedulers(self) -> Mapping[str, LRScheduler]:
        """Name of the optimizer -> its scheduler."""
        return {name: one.scheduler for name, one in self._named_schedules.items()}

    def named_schedules(self) -> Mapping[str, schedules.Schedule]:
        """Name of the optimizer -> its scheduler, and when that steps."""
        return self._named_schedules

    @property
    def train_dataloader(self) -> ResumableLoader:
        """The train loader, resumable."""
        return self._train_dataloader  # type: ignore[no-any-return]

    @property
    def val_dataloader(self) -> ResumableLoader | None:
        """The validation loader, if there is one."""
        return self._val_dataloader  # type: ignore[no-any-return]

    @property
    def sync_modules(self) -> Sequence[nn.Module]:
        """The wrapped models."""
        return list(self._wrapped_models.values())

    def unplaced_model(self, name: str) -> nn.Module:
        """A copy, or, if it is sharded, what ``configure_models`` makes."""
        if not any(is_dtensor(one) for one in self._models[name].parameters()):
            return super().unplaced_model(name)
        # Attributes that it assigns are to be the twin's.
        twin = object.__new__(type(self))
        vars(twin).update(vars(self))
        twin.configure_models()
        made: nn.Module = getattr(twin, name)
        return copy_of_unsharded(made, name)

    # ------------------------------------------------------------------ inside

    def _with_policies(self, model: nn.Module) -> nn.Module:
        """Policies that no mesh is needed for; under ``MeshStrategy`` they come in between."""
        if not isinstance(self.world.strategy, world.MeshStrategy):
            self._apply_local(model)
        return model

    def _apply_local(self, model: nn.Module) -> None:
        devices = self.config.device_parameters
        if devices.checkpoint_activations:
            self.apply_activation_checkpointing(model)
        if devices.compile_model:
            self.apply_compile(model)

    def _parallelize(self, model: nn.Module, strategy: world.MeshStrategy) -> nn.Module:
        # The one order that works: what splits layers sees them plain, sharding sees the result.
        if strategy.tp_size > 1:
            self.apply_tensor_parallel(model, strategy.device_mesh["tp"])
        self._apply_local(model)
        self.apply_fully_shard(model, **strategy.fsdp_arguments)
        return model

    def _rebind(self, made: Mapping[str, Any], wrapped: Mapping[str, Any]) -> None:
        """Let attributes that hold an object as it was made hold the wrapped one."""
        replacements = {id(made[name]): wrapped[name] for name in made}
        for attribute, value in list(vars(self).items()):
            if id(value) in replacements:
                setattr(self, attribute, replacements[id(value)])
