"""What keeps a model from being compiled as one graph, once: breaks and recompilations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from dream_trainer.errors import ConfigError
from dream_trainer.inspection.compile_log import CompileLog, GraphBreak, Recompilation
from dream_trainer.inspection.throw_away import Answer, ChangedBatches, run_thrown_away
from dream_trainer.words import counted

if TYPE_CHECKING:
    from dream_trainer.trainer.base import BaseTrainer, BaseTrainerConfig


@dataclass(frozen=True)
class CompileReport:
    """What compiling a trainer's models met. ``str()`` is a report.

    Attributes:
        steps: batches that were trained on.
        graphs: graphs that were compiled.
        breaks: places where a graph ended early, those met most often first.
        recompilations: compilations of a function that was compiled already, by cause.
    """

    steps: int
    graphs: int
    breaks: tuple[GraphBreak, ...]
    recompilations: tuple[Recompilation, ...]

    @property
    def is_clean(self) -> bool:
        """Whether something was compiled, without a break and without a recompilation."""
        return self.graphs > 0 and not (self.breaks or self.recompilations)

    def __str__(self) -> str:
        counts = (
            f"{self.steps} batches",
            f"{self.graphs} graph{'s' * (self.graphs != 1)}",
            _counted(self.breaks, "graph break"),
            _counted(self.recompilations, "recompilation"),
        )
        lines = [", ".join(counts)]
        if not self.graphs:
            lines.append(
                "nothing was compiled: torch's own modules, an nn.Sequential for one, have no code "
                "that compile() would take; wrap the model in a class with a forward"
            )
        for title, found in (
            ("graph breaks", self.breaks),
            ("recompilations", self.recompilations),
        ):
            if found:
                lines += ["", title, *(str(one) for one in found)]
        return "\n".join(lines)


def find_graph_breaks(
    make_trainer: Callable[[Any], BaseTrainer],
    config: BaseTrainerConfig,
    *,
    batches: int = 4,
    vary_shapes: bool = True,
) -> CompileReport:
    """Train on a few batches with compiled models, and list what the compiler complains of.

    Models are compiled as the trainer's ``apply_compile`` does it, also if ``compile_model`` is
    False, or whole where nothing is compiled then; with torch's backend ``eager``, which traces and
    guards as any other does, and generates no code: no C++ compiler is needed. The run is thrown
    away. Settings of ``torch._logging.set_logs`` are reset.

    Args:
        make_trainer: a trainer class, or a function from a configuration to a trainer.
        config: what it is called with; it stays as it is. One process.
        batches: to train on, with an optimizer step each.
        vary_shapes: cut the last two batches along their first dimension, to half and to a third
            of their samples: an epoch's last batch is often shorter than the others.

    Raises:
        ConfigError: ``batches`` is too small, or the run has several processes.
    """
    least = 3 if vary_shapes else 1
    if batches < least:
        raise ConfigError(
            "find_graph_breaks",
            [f"batches is {batches}, and must be at least {least}"],
            "The first one is compiled for; the last two are cut." if vary_shapes else "",
        )
    changes: dict[int, Callable[[Any], Any]] = {}
    if vary_shapes:
        changes = {batches - 2: partial(_cut, 2), batches - 1: partial(_cut, 3)}
    report: CompileReport = run_thrown_away(
        make_trainer,
        config,
        steps=batches,
        answer=_Finder(batches, changes),
        compile_model=True,
        gradient_accumulation_steps=1,
        global_batch_size=None,
    )
    return report


class _Finder(Answer):
    """Listens to the compiler from set-up to the last step."""

    def __init__(self, batches: int, changes: dict[int, Callable[[Any], Any]]) -> None:
        self._batches, self._changes = batches, changes
        self._log: CompileLog | None = None
        self._stance: Any = None

    def pre_fit(self, trainer: BaseTrainer) -> None:
        if trainer.world.size > 1:
            raise ConfigError(
                "device_parameters",
                [f"{trainer.world.size} processes; find_graph_breaks works with one"],
                "Set device_parameters=DeviceParameters.SINGLE_DEVICE() in the configuration.",
            )
        ChangedBatches(trainer.loop.train_loader, changes=self._changes).install(trainer)
        models = list(trainer.named_models().values())
        if not any(_is_compiled(part) for model in models for part in model.modules()):
            for model in models:
                model.compile()
        torch.compiler.reset()
        self._log = CompileLog()
        self._stance = torch.compiler.set_stance("default", force_backend="eager")
        self._stance.__enter__()

    def post_fit(self, trainer: BaseTrainer) -> None:
        assert self._log is not None
        breaks, recompilations = self._log.breaks, self._log.recompilations
        self.tell(
            trainer,
            CompileReport(trainer.progress.num_batches, self._log.graphs, breaks, recompilations),
        )

    def close(self, trainer: BaseTrainer) -> None:
        if self._stance is not None:
            self._stance.__exit__(None, None, None)
            self._stance = None
        if self._log is not None:
            self._log.close()
            self._log = None
            torch.compiler.reset()


def _is_compiled(module: torch.nn.Module) -> bool:
    from torch._dynamo import OptimizedModule

    return isinstance(module, OptimizedModule) or module._compiled_call_impl is not None


def _cut(parts: int, batch: Any) -> Any:
    """The first samples of a batch, one of so many parts of them."""
    from torch.utils._pytree import tree_map

    sizes = [len(one) for one in _tensors(batch) if one.ndim]
    if not sizes or min(sizes) != max(sizes) or sizes[0] < parts:
        return batch
    keep = max(sizes[0] // parts, 2)  # torch takes 1 for a shape of its own
    return tree_map(lambda one: one[:keep] if isinstance(one, torch.Tensor) else one, batch)


def _tensors(batch: Any) -> list[torch.Tensor]:
    from torch.utils._pytree import tree_leaves

    return [one for one in tree_leaves(batch) if isinstance(one, torch.Tensor)]


def _counted(found: tuple[GraphBreak, ...] | tuple[Recompilation, ...], noun: str) -> str:
    if not found:
        return f"no {noun}"
    return counted(sum(one.times for one in found), noun)
