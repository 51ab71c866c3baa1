"""``self.log`` of a LightningModule, and the phases whose values it collects."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import is_dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dream_trainer.host_values import to_host
from dream_trainer.reductions import ReducedValues, reduction
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
        latest: newest values by name, in the order in which they came; of steps and of hooks
            around an epoch this rank's, else those of all ranks.
    """

    def __init__(self, run: LightningModuleTrainer) -> None:
        self._run = run
        self.phase, self.is_in_step = "train", False
        self.batch: Any = None
        self.latest: dict[str, Any] = {}
        self._values: dict[str, ReducedValues] = {}
        # By phase and name: to be computed at its end, and to be reset before its next beginning.
        self._metrics: dict[str, dict[str, Any]] = {}
        self._seen: dict[str, dict[str, Any]] = {}

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
        """Like ``LightningModule.log``; what is logged is always reduced over all ranks.

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
        if is_metric(value):
            self._require_part(name, value)
            self._seen.setdefault(self.phase, {})[name] = value
        is_both = on_step and on_epoch
        if on_epoch:
            epoch_name = f"{name}_epoch" if is_both else name
            self._log_epoch(epoch_name, value, batch_size, reduction(reduce_fx), logger)
        if on_step and is_training:
            self._log_step(name, value, logger, is_both=is_both)

    def log_dict(self, dictionary: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        """Like ``LightningModule.log_dict``."""
        options: dict[str, Any] = {"keep_base": False} if is_metric(dictionary) else {}
        for name, value in dictionary.items(**options):
            self.log(name, value, *args, **kwargs)

    def _log_step(self, name: str, value: Any, logger: bool | None, *, is_both: bool) -> None:
        if is_metric(value) and (value := value._forward_cache) is None:
            return  # updated, and not called
        number = _number(name, value)
        self._note(name, number)
        if is_both:
            name = f"{name}_step"
            self._note(name, number)
        if logger is not False:
            self._run.logged.add({_in_row(name): number})

    def _log_epoch(
        self, name: str, value: Any, batch_size: int | None, reduce: str, logger: bool | None
    ) -> None:
        is_over = self.phase == "train" and not self.is_in_step
        if is_metric(value) and not is_over:
            self._metrics.setdefault(self.phase, {})[name] = value
        elif is_over:
            # A hook around an epoch: there is one value alone.
            if is_metric(value):
                (value,) = self._computed({name: value}).values()
            number = _number(name, value)
            self._note(name, to_host([number])[0])
            if logger is not False:
                self._run.logged.add({_in_row(name): number})
        else:
            weight = batch_size if batch_size is not None else size_of_batch(self.batch) or 1
            values = self._values.setdefault(self.phase, ReducedValues())
            values.add(name, _number(name, value), float(weight), reduce)

    def _note(self, name: str, value: Any) -> None:
        self.latest.pop(name, None)
        self.latest[name] = value

    def _require_part(self, name: str, metric: Any) -> None:
        if not any(part is metric for part in self._run.module.modules()):
            raise ValueError(
                f"self.log({name!r}): the metric is no part of the module, so it would not be "
                "saved. Assign it to self, or put several into a ModuleDict."
            )

    def reset(self, phase: str) -> None:
        """Begin a phase anew."""
        self._values.pop(phase, None)
        self._metrics.pop(phase, None)
        for metric in self._seen.get(phase, {}).values():
            metric.reset()

    def results(self, phase: str) -> dict[str, float]:
        """Over all ranks, of what was logged in a phase. A collective."""
        gather = self._run.world.gather_data_parallel
        found = self._values.get(phase, ReducedValues()).results(gather)
        found |= self._computed(self._metrics.get(phase, {}))
        if phase != "sanity":
            for name, value in found.items():
                self._note(name, value)
                plain = name.removesuffix("_epoch")
                if plain != name and f"{plain}_step" in self.latest:
                    self._note(plain, value)
        if phase != "train":
            self.reset(phase)  # another phase may have the same metrics
        return {_in_row(name): value for name, value in found.items()}

    def _computed(self, metrics: Mapping[str, Any]) -> dict[str, float]:
        world = self._run.world
        if world.size == 1:
            values = {name: metric.compute() for name, metric in metrics.items()}
        else:
            with merged_over_ranks(metrics, world.gather_data_parallel):
                values = {name: metric.compute() for name, metric in metrics.items()}
        return dict(zip(values, to_host(list(values.values())), strict=True))

    def callback_metrics(self) -> dict[str, Any]:
        """Newest values by name, as tensors."""
        return {name: torch.as_tensor(value) for name, value in self.latest.items()}

    def numbers(self) -> dict[str, float]:
        """Newest values by name."""
        return dict(zip(self.latest, to_host(list(self.latest.values())), strict=True))

    def monitored(self, name: str) -> float | None:
        """The newest value of a name, the mean over those of all ranks. A collective."""
        own = self.latest.get(name)
        gathered = self._run.world.gather_data_parallel(None if own is None else float(own))
        known = [value for value in gathered if value is not None]
        if not known:
            return None
        return known[0] if len({*known}) == 1 else sum(known) / len(known)

    def state_dict(self) -> dict[str, Any]:
        """This rank's, of the training epoch under way."""
        paths = {id(part): path for path, part in self._run.module.named_modules()}

        def placed(metrics: Mapping[str, Any]) -> dict[str, str]:
            return {name: paths[id(metric)] for name, metric in metrics.items()}

        return {
            "values": self._values.get("train", ReducedValues()).state_dict(),
            "metrics": placed(self._metrics.get("train", {})),
            "seen": {phase: placed(metrics) for phase, metrics in self._seen.items()},
            "latest": self.numbers(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        part = self._run.module.get_submodule
        self._values["train"] = ReducedValues()
        self._values["train"].load_state_dict(state["values"])
        self._metrics["train"] = {name: part(path) for name, path in state["metrics"].items()}
        self._seen = {
            phase: {name: part(path) for name, path in metrics.items()}
            for phase, metrics in state["seen"].items()
        }
        self.latest = dict(state["latest"])


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

    def end(self, phase: str) -> None:
        """End a prediction, with the module's hooks."""
        self._run.call(f"on_{phase}_epoch_end")
        self._run.call(f"on_{phase}_end")

    def state_dict(self) -> dict[str, Any]:
        """What this rank's training metrics and logged values have gathered in the epoch."""
        return {**super().state_dict(), "journal": self._run.journal.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        super().load_state_dict(state)
        if "journal" in state:
            self._run.journal.load_state_dict(state["journal"])


def size_of_batch(batch: Any) -> int | None:
    """Rows of the first tensor in a batch; None if there is none."""
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.ndim else 1
    if is_dataclass(batch):
        batch = vars(batch)
    parts = batch.values() if isinstance(batch, Mapping) else batch
    if not isinstance(parts, Iterable) or isinstance(parts, (str, bytes)):
        return None
    return next((size for part in parts if (size := size_of_batch(part)) is not None), None)


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
