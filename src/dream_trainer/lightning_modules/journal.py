"""``self.log`` of a LightningModule, and the phases whose values it collects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dream_trainer.lightning_modules.epoch_values import EpochValues, reduction
from dream_trainer.metrics import to_host
from dream_trainer.trainer.metric_phases import MetricPhases
from dream_trainer.trainer.metric_states import is_metric, merged_over_ranks

if TYPE_CHECKING:
    from dream_trainer.lightning_modules.trainer import LightningModuleTrainer

_EVALUATIONS = {"val": "validation", "sanity": "validation", "test": "test", "predict": "predict"}


class Journal:
    """What a module logs, by the phase under way.

    Values of a step go to the step's row; those of an epoch are reduced over its batches and over
    all ranks, always.

    Args:
        run: the trainer that runs the module.

    Attributes:
        phase: ``"train"``, ``"val"``, ``"sanity"``, ``"test"``, ``"predict"``, or ``"filler"``
            for batches that only keep ranks in step.
        is_in_step: whether ``training_step`` and its batch's hooks are under way.
        batch: under way.
        latest: newest results by name.
    """

    def __init__(self, run: LightningModuleTrainer) -> None:
        self._run = run
        self.phase, self.is_in_step = "train", False
        self.batch: Any = None
        self.latest: dict[str, float] = {}
        self._steps: dict[str, Any] = {}
        self._plain_names: dict[str, str] = {}
        self._values: dict[str, EpochValues] = {}
        self._metrics: dict[str, dict[str, Any]] = {}

    def log(
        self,
        name: str,
        value: Any,
        prog_bar: bool = False,
        logger: bool | None = None,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        reduce_fx: Any = "mean",
        enable_graph: bool = False,
        sync_dist: bool = False,
        sync_dist_group: Any = None,
        add_dataloader_idx: bool = True,
        batch_size: int | None = None,
        metric_attribute: str | None = None,
        rank_zero_only: bool = False,
    ) -> None:
        """Like ``LightningModule.log``; what is logged is always the mean over all ranks.

        Raises:
            ValueError: the value is no number, or the arguments ask for what is not supported.
        """
        if self.phase == "filler":
            return
        is_training = self.phase == "train"
        on_step = (is_training and self.is_in_step) if on_step is None else on_step
        on_epoch = not (is_training and self.is_in_step) if on_epoch is None else on_epoch
        if self.phase == "predict":
            raise ValueError(f"self.log({name!r}): nothing can be logged while predicting")
        if on_step and not is_training and not on_epoch:
            raise ValueError(
                f"self.log({name!r}, on_step=True, on_epoch=False): single batches of a "
                "validation or test are not logged; log the epoch"
            )
        if sync_dist_group is not None:
            raise ValueError(f"self.log({name!r}): sync_dist_group is not supported")
        is_both = on_step and on_epoch
        if is_both:
            self._plain_names[f"{name}_epoch"] = name
        if on_epoch:
            epoch_name = f"{name}_epoch" if is_both else name
            self._log_epoch(epoch_name, value, batch_size, reduction(reduce_fx), logger)
        if on_step and is_training:
            self._log_step(f"{name}_step" if is_both else name, value, logger)

    def log_dict(self, dictionary: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        """Like ``LightningModule.log_dict``."""
        options: dict[str, Any] = {"keep_base": False} if is_metric(dictionary) else {}
        for name, value in dictionary.items(**options):
            self.log(name, value, *args, **kwargs)

    def _log_step(self, name: str, value: Any, logger: bool | None) -> None:
        if is_metric(value):
            value = value._forward_cache
        number = _number(name, value)
        self._steps[name] = number
        if logger is not False:
            self._run.logged.add({_in_row(name): number})

    def _log_epoch(
        self, name: str, value: Any, batch_size: int | None, reduce: str, logger: bool | None
    ) -> None:
        if is_metric(value):
            self._metrics.setdefault(self.phase, {})[name] = value
        elif self.phase == "train" and not self.is_in_step:
            number = _number(name, value)  # of an epoch that is over: there is one alone
            self.latest |= dict(zip([name], to_host([number]), strict=True))
            if logger is not False:
                self._run.logged.add({_in_row(name): number})
        else:
            weight = batch_size if batch_size is not None else size_of_batch(self.batch)
            values = self._values.setdefault(self.phase, EpochValues())
            values.add(name, _number(name, value), float(weight), reduce)

    def reset(self, phase: str) -> None:
        """Begin a phase anew."""
        self._values.pop(phase, None)
        for metric in self._metrics.get(phase, {}).values():
            metric.reset()

    def results(self, phase: str) -> dict[str, float]:
        """Over all ranks, of what was logged in a phase. A collective."""
        world = self._run.world
        found = self._values.get(phase, EpochValues()).results(world.gather_data_parallel)
        metrics = self._metrics.get(phase, {})
        if world.size == 1:
            values = {name: metric.compute() for name, metric in metrics.items()}
        else:
            with merged_over_ranks(metrics, world.gather_data_parallel):
                values = {name: metric.compute() for name, metric in metrics.items()}
        found |= dict(zip(values, to_host(list(values.values())), strict=True))
        if phase == "sanity":
            self.reset(phase)  # its metrics are those of the validation
        else:
            self.latest |= found
        return {_in_row(name): value for name, value in found.items()}

    def callback_metrics(self) -> dict[str, Any]:
        """Newest values by name, as tensors; those of steps are this rank's."""
        known = {**self._steps, **self.latest}
        known |= {plain: known[name] for name, plain in self._plain_names.items() if name in known}
        return {name: torch.as_tensor(value) for name, value in known.items()}

    def state_dict(self) -> dict[str, Any]:
        """This rank's, of the training epoch under way."""
        paths = {id(part): path for path, part in self._run.module.named_modules()}
        metrics = self._metrics.get("train", {})
        return {
            "values": self._values.get("train", EpochValues()).state_dict(),
            "metrics": {name: paths[id(metric)] for name, metric in metrics.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self._values["train"] = EpochValues()
        self._values["train"].load_state_dict(state["values"])
        self._metrics["train"] = {
            name: self._run.module.get_submodule(path) for name, path in state["metrics"].items()
        }


class ModulePhases(MetricPhases):
    """Where phases begin and end: a module's hooks there, and its values and metrics.

    Args:
        run: the trainer that runs the module.
    """

    def __init__(self, run: LightningModuleTrainer) -> None:
        super().__init__(run)
        self._run = run

    def enter(self, phase: str) -> None:
        """Log to this phase from now on."""
        self._run.journal.phase = phase

    def reset(self, phase: str) -> None:
        """Begin a phase; of an evaluation, with the module's hooks."""
        journal = self._run.journal
        journal.reset(phase)
        journal.batch = None
        if (name := _EVALUATIONS.get(phase)) is not None:
            journal.phase = phase
            self._run.call(f"on_{name}_start")
            self._run.call(f"on_{name}_epoch_start")

    def compute(self, phase: str) -> dict[str, float]:
        """End a phase; its results."""
        name = _EVALUATIONS.get(phase)
        if name is not None:
            self._run.journal.phase, self._run.journal.batch = phase, None
            self._run.call(f"on_{name}_epoch_end")
        results = self._run.journal.results(phase)
        if name is not None:
            self._run.call(f"on_{name}_end")
        return results

    def state_dict(self) -> dict[str, Any]:
        """What this rank's training metrics and logged values have gathered in the epoch."""
        return {**super().state_dict(), "journal": self._run.journal.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        super().load_state_dict(state)
        if "journal" in state:
            self._run.journal.load_state_dict(state["journal"])


def size_of_batch(batch: Any) -> int:
    """Rows of the first tensor in a batch; 1 if there is none."""
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.ndim else 1
    parts = batch.values() if isinstance(batch, Mapping) else batch
    if isinstance(parts, (list, tuple)) or isinstance(batch, Mapping):
        for part in parts:
            if isinstance(part, (Tensor, Mapping, list, tuple)):
                return size_of_batch(part)
    return 1


def _in_row(name: str) -> str:
    """A row of the log has counters of its own."""
    return f"module/{name}" if name in ("step", "epoch") else name


def _number(name: str, value: Any) -> Any:
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(
                f"self.log({name!r}): the tensor has shape {tuple(value.shape)}; log one number"
            )
        return value.detach()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        try:
            return float(value)
        except (TypeError, ValueError):
            raise ValueError(f"self.log({name!r}): a {type(value).__name__} is no number") from None
    return value
