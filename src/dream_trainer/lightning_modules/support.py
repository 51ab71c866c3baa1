"""What of a LightningModule is run here, and what is refused before the run starts."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from dream_trainer.configs import DeviceParameters
from dream_trainer.errors import ConfigError

#: Methods that may be overridden: everything is called that is named here.
SUPPORTED = frozenset(
    """
    forward training_step validation_step test_step predict_step
    configure_model configure_optimizers configure_gradient_clipping configure_callbacks
    optimizer_step lr_scheduler_step backward
    prepare_data setup teardown
    train_dataloader val_dataloader test_dataloader predict_dataloader
    on_before_batch_transfer transfer_batch_to_device on_after_batch_transfer
    on_fit_start on_fit_end on_train_start on_train_end on_train_epoch_start on_train_epoch_end
    on_train_batch_start on_train_batch_end
    on_before_zero_grad on_before_backward on_after_backward on_before_optimizer_step
    on_validation_start on_validation_end on_validation_epoch_start on_validation_epoch_end
    on_validation_batch_start on_validation_batch_end
    on_test_start on_test_end on_test_epoch_start on_test_epoch_end
    on_test_batch_start on_test_batch_end
    on_predict_start on_predict_end on_predict_epoch_start on_predict_epoch_end
    on_predict_batch_start on_predict_batch_end
    on_save_checkpoint on_load_checkpoint
    """.split()
)
#: What a data module may have of its own.
SUPPORTED_DATA = frozenset(
    """
    prepare_data setup teardown on_exception state_dict load_state_dict
    train_dataloader val_dataloader test_dataloader predict_dataloader
    on_before_batch_transfer transfer_batch_to_device on_after_batch_transfer
    """.split()
)
#: Lightning's classes whose methods are hooks; other methods may be overridden as one likes.
_HOLD_HOOKS = frozenset(
    "LightningModule LightningDataModule ModelHooks DataHooks CheckpointHooks".split()
)
#: Methods of those that the run does not call.
_TOOLS = frozenset(
    """
    load_from_checkpoint save_hyperparameters to_onnx to_torchscript to_tensorrt freeze unfreeze
    print from_datasets
    """.split()
)
_INSTEAD = {
    "optimizer_zero_grad": "gradients are set to None after each step",
    "configure_sharded_model": "use configure_model",
    "on_validation_model_zero_grad": "gradients are None there anyway",
    "configure_callbacks": "give the configuration callbacks of this package",
}


def base_of(cls: type, name: str) -> type | None:
    """Lightning's class of that name among the bases, whichever of its two packages it is from."""
    for one in cls.__mro__:
        if one.__name__ == name and one.__module__.split(".")[0] in (
            "lightning",
            "pytorch_lightning",
        ):
            return one
    return None


def own_hooks(one: object) -> list[str]:
    """Hooks that a module or data module, its class or the object itself, has its own of."""
    kind = type(one)
    base = base_of(kind, "LightningModule") or base_of(kind, "LightningDataModule")
    if base is None:
        return []
    hooks = {
        name: member
        for owner in base.__mro__
        if owner.__name__ in _HOLD_HOOKS
        for name, member in vars(owner).items()
        if name[0] != "_" and callable(member) and name not in _TOOLS
    }
    return sorted(
        name
        for name in hooks
        if inspect.getattr_static(one, name) is not inspect.getattr_static(base, name)
    )


def require_supported(
    module: Any,
    datamodule: Any,
    devices: DeviceParameters,
    *,
    is_sharded: bool,
    scales_loss: bool,
) -> None:
    """Refuse, all at once, what would be ignored or done otherwise.

    Raises:
        ConfigError: naming every method.
    """
    if isinstance(module, type):
        raise ConfigError("module", [f"it is a class; pass an instance: {module.__name__}(...)"])
    if base_of(type(module), "LightningModule") is None:
        raise ConfigError(
            "module",
            [f"it is a {type(module).__name__}, and no LightningModule"],
            "For another module, write a DreamTrainer.",
        )
    own = own_hooks(module)
    problems = list(_problems(module, own, is_sharded=is_sharded, scales_loss=scales_loss))
    problems += [
        f"device_parameters.{name}: a LightningModule does that itself, in configure_model"
        for name in ("compile_model", "checkpoint_activations")
        if getattr(devices, name)
    ]
    if devices.tensor_parallel not in (1, "auto"):
        problems.append("device_parameters.tensor_parallel: nobody says how to split the module")
    if datamodule is not None and base_of(type(datamodule), "LightningDataModule") is None:
        problems.append(
            f"datamodule is a {type(datamodule).__name__}, no LightningDataModule; "
            "a loader is passed by name, train_dataloader=..."
        )
    elif datamodule is not None:
        kind = type(datamodule)
        problems += [
            f"{kind.__name__}.{name} is not supported"
            for name in own_hooks(datamodule)
            if name not in SUPPORTED_DATA
        ]
    if problems:
        raise ConfigError(
            type(module).__name__,
            problems,
            "Change these, or write the trainer as a DreamTrainer "
            "(docs: Migrating, From the Lightning Trainer).",
        )


def _problems(module: Any, own: list[str], *, is_sharded: bool, scales_loss: bool) -> Iterator[str]:
    if "training_step" not in own:
        yield "training_step is not written"
    elif "dataloader_iter" in inspect.signature(module.training_step).parameters:
        yield "training_step(dataloader_iter) is not supported: the loop reads the loader"
    if "configure_optimizers" not in own:
        yield "configure_optimizers is not written"
    for name in own:
        if name not in SUPPORTED:
            yield f"{name} is not supported" + _because(name)
    if "configure_callbacks" in own and module.configure_callbacks():
        yield "configure_callbacks returns Lightning's callbacks" + _because("configure_callbacks")
    if not module.automatic_optimization:
        if is_sharded:
            yield "automatic_optimization=False is not supported on a sharded module"
        for name in ("optimizer_step", "configure_gradient_clipping", "backward"):
            if name in own:
                yield f"{name} is not called with automatic_optimization=False"
    if scales_loss:
        for name in ("configure_gradient_clipping", "backward"):
            if name in own:
                yield f'{name} is not supported with precision="16-mixed"'


def _because(name: str) -> str:
    return f": {_INSTEAD[name]}" if name in _INSTEAD else ""


def num_arguments(method: Any) -> int | None:
    """How many arguments it takes, None for any: ``batch_idx`` may be left out of a step."""
    parameters = inspect.signature(method).parameters.values()
    if any(one.kind is one.VAR_POSITIONAL for one in parameters):
        return None
    return sum(one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD) for one in parameters)


def plain_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Without what a checkpoint does not hold: objects, functions, types."""
    return {name: value for name, value in values.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(one) for key, one in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (str, int, float, bool))
