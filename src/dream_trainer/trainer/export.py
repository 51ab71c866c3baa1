"""A model as one file: a program that needs none of its code, or its weights."""

from __future__ import annotations

import importlib
import importlib.util
import tempfile
import warnings
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dream_trainer.checkpointing.export import write_weights
from dream_trainer.checkpointing.weights import import_safetensors
from dream_trainer.errors import ConfigError
from dream_trainer.storage import atomic_file
from dream_trainer.world.sharded import is_dtensor

if TYPE_CHECKING:
    from dream_trainer.trainer.base import BaseTrainer

_PROGRAMS = (".pt2", ".onnx")
_WEIGHTS = (".safetensors", ".pt", ".pth")
#: Another runtime adds in another order.
_RTOL, _ATOL = 1e-3, 1e-4


@dataclass(frozen=True)
class Example:
    """What a model is called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, given: Any) -> Example:
        """From one argument, a tuple of them, or a mapping by name."""
        if isinstance(given, Mapping):
            return cls((), dict(given))
        return cls(given if isinstance(given, tuple) else (given,), {})

    @property
    def tensors(self) -> list[Tensor]:
        """In the order in which an exported program takes them."""
        leaves = pytree.tree_leaves((self.args, self.kwargs))
        return [one for one in leaves if isinstance(one, Tensor)]

    @property
    def num_samples(self) -> int:
        """The first dimension of its first tensor; 0 if there is none."""
        return next((len(one) for one in self.tensors if one.ndim), 0)

    def map(self, function: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Apply a function to what has a row a sample; the rest becomes what it gives for None."""

        def apply(value: Any) -> Any:
            has_rows = isinstance(value, Tensor) and value.ndim and len(value) == self.num_samples
            return function(value, has_rows)

        args, kwargs = pytree.tree_map(apply, (self.args, self.kwargs))
        return args, kwargs

    def first(self, num_samples: int) -> Example:
        """Of its first samples alone."""
        return Example(*self.map(lambda value, has: value[:num_samples] if has else value))

    def call(self, module: Any) -> Any:
        """What a module makes of it."""
        with torch.no_grad():
            return module(*self.args, **self.kwargs)


def export(
    trainer: BaseTrainer, path: Path, *, model: str | None, example: Any, overwrite: bool
) -> Path:
    """See `BaseTrainer.export`. A collective, with the weights to export in place."""
    ranks = trainer.world.ranks
    # Rank 0 looks: a slower rank would take what it has written for somebody else's.
    ranks.on_zero(lambda: _check_target(path, overwrite))
    is_whole = model is None and path.suffix in _WEIGHTS
    names = list(trainer.components.models) if is_whole else [_model_name(trainer, model)]
    states = _whole_states(trainer, names)
    if path.suffix in _WEIGHTS:
        facts = {"step": str(trainer.global_step), "epoch": str(trainer.current_epoch)}
        ranks.on_zero(lambda: write_weights(path, states, facts))
        return path
    given = trainer.export_example(_first_batch(trainer)) if example is None else example
    inputs = Example.of(pytree.tree_map(_on_host, trainer.world.to_precision(given)))
    if inputs.num_samples < 2:
        raise ConfigError(
            "export",
            [f"the example has {inputs.num_samples} samples; of one alone torch fixes the size"],
            "Let the first dimension of its tensors be the samples, two or more.",
        )
    ranks.on_zero(lambda: _write_program(trainer, names[0], states[names[0]], inputs, path))
    return path


def _model_name(trainer: BaseTrainer, given: str | None) -> str:
    models = list(trainer.components.models)
    if given in models:
        return str(given)
    if given is None and len(models) == 1:
        return models[0]
    what = "there are several models" if given is None else f"there is no model {given!r}"
    raise ConfigError("export", [what], f"Choose one with model=, of {', '.join(models)}.")


def _check_target(path: Path, overwrite: bool) -> None:
    problems = []
    if path.suffix not in (*_PROGRAMS, *_WEIGHTS):
        problems.append(
            f"ends in {path.suffix!r}, not in .pt2, .onnx, .safetensors, .pt or .pth"
            + (" (export_checkpoint writes .ckpt)" if path.suffix == ".ckpt" else "")
        )
    if path.is_dir() or (path.exists() and not overwrite):
        problems.append("is there already; choose another name, or overwrite=True (--overwrite)")
    if problems:
        raise ConfigError(str(path), problems)
    if path.suffix == ".safetensors":
        import_safetensors(path)
    if path.suffix == ".onnx":
        missing = [n for n in ("onnx", "onnxscript") if importlib.util.find_spec(n) is None]
        if missing:
            raise ConfigError(
                str(path),
                [f"ONNX needs the package {one}, which is not installed" for one in missing],
                "pip install 'dream-trainer[onnx]'",
            )


def _whole_states(trainer: BaseTrainer, names: list[str]) -> dict[str, dict[str, Any]]:
    """State dicts in the host memory of rank 0; empty ones elsewhere."""
    own = trainer.components.model_states()
    states: dict[str, dict[str, Any]] = {name: {} for name in names}
    for name in names:
        for key, value in own[name].items():
            whole = value.full_tensor() if is_dtensor(value) else value  # a collective
            if trainer.world.is_global_zero:
                states[name][key] = whole.cpu() if isinstance(whole, Tensor) else whole
    return states


def _first_batch(trainer: BaseTrainer) -> Any:
    loader = trainer.loop.val_loader
    if loader is None:
        raise ConfigError(
            "export", ["there is no validation loader to take an example from"], "Pass example=."
        )
    loader.rewind()
    with closing(iter(loader)) as batches:  # the train loader has a position to keep
        batch = next(batches)
    loader.rewind()
    return batch


def _on_host(value: Any) -> Any:
    return value.detach().cpu() if isinstance(value, Tensor) else value


def _write_program(
    trainer: BaseTrainer, name: str, state: dict[str, Any], example: Example, path: Path
) -> None:
    module = _on_one_device(trainer, name, state)
    program = _program(module, example, name)
    exact = Example.call  # eager, of the same weights
    _compare(exact(example, program.module()), exact(example, module), path, exactly=True)
    fewer = example.first(example.num_samples - 1)
    _compare(exact(fewer, program.module()), exact(fewer, module), path, exactly=True)
    try:
        if path.suffix == ".pt2":
            with atomic_file(path) as beside, beside.open("wb") as opened:
                torch.export.save(program, opened)
        else:
            _write_onnx(program, module, (example, fewer), path)
    except OSError as error:
        raise ConfigError(str(path), [f"cannot be written: {error}"]) from error


def _on_one_device(trainer: BaseTrainer, name: str, state: dict[str, Any]) -> nn.Module:
    module = trainer.unplaced_model(name).eval()
    unsaved = {n for n, one in module.named_buffers() if one.is_meta} - state.keys()
    if unsaved:
        raise ConfigError(
            f"export of {name}",
            [f"buffer {one} is made on the meta device, and not saved" for one in sorted(unsaved)],
            "Export on one process: any checkpoint loads with devices=1.",
        )
    if any(one.is_meta for one in module.state_dict().values() if isinstance(one, Tensor)):
        module = module.to_empty(device="cpu")
    module.load_state_dict(state)
    return module


def _program(module: nn.Module, example: Example, name: str) -> Any:
    batch = torch.export.Dim("batch")
    args, kwargs = example.map(lambda _, has_rows: {0: batch} if has_rows else None)
    shapes = (*args, *kwargs.values())
    try:
        return torch.export.export(
            module, example.args, example.kwargs, dynamic_shapes=shapes, strict=False
        )
    except Exception as error:  # it fails in as many ways as there are models
        raise ConfigError(
            f"export of {name}",
            [f"torch.export cannot follow the model: {type(error).__name__}: {error}"],
            "What its forward decides must not depend on values or on the number of samples.",
        ) from error


def _write_onnx(program: Any, module: nn.Module, examples: tuple[Example, ...], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Under its own name: a large model has its weights in a file beside it, called after it.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        beside = Path(folder, path.name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter's own deprecated parts
            torch.onnx.export(program, dynamo=True, verbose=False).save(beside)  # type: ignore[union-attr]
        if importlib.util.find_spec("onnxruntime") is None:
            warnings.warn(
                f"{path} was not run: onnxruntime is not installed, so nobody knows yet whether "
                "it computes the same.",
                stacklevel=2,
            )
        else:
            for example in examples:
                made, wanted = _run_onnx(beside, example), example.call(module)
                _compare(made, pytree.tree_leaves(wanted), path, exactly=False)
        for file in sorted(Path(folder).iterdir(), reverse=True):  # the weights first
            file.replace(path.with_name(file.name))


def _run_onnx(file: Path, example: Example) -> list[Tensor]:
    runtime = importlib.import_module("onnxruntime")
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    values = [one.numpy() for one in example.tensors]
    made = session.run(None, dict(zip(names, values, strict=True)))
    return [torch.from_numpy(one) for one in made]


def _compare(made: Any, wanted: Any, path: Path, *, exactly: bool) -> None:
    """Refuse a program that computes something else than its model.

    Raises:
        ConfigError: it does.
    """
    pairs = list(zip(pytree.tree_leaves(made), pytree.tree_leaves(wanted), strict=True))
    tensors = [(one, other) for one, other in pairs if isinstance(other, Tensor)]
    is_same = all(torch.equal(one.nan_to_num(), other.nan_to_num()) for one, other in tensors)
    if is_same:
        return
    if all(torch.allclose(*pair, _RTOL, _ATOL, equal_nan=True) for pair in tensors):
        if exactly:
            text = f"{path} rounds differently than the model itself, in the last digits"
            warnings.warn(text, stacklevel=2)
        return
    largest = max(float((one.double() - other.double()).abs().max()) for one, other in tensors)
    raise ConfigError(
        str(path),
        [f"the exported program computes something else than the model: by up to {largest:g}"],
        "It was not written. Does the model draw random numbers, or change itself, in eval mode?",
    )
