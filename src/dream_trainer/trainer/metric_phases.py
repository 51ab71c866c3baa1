"""torchmetrics of a trainer: one copy per phase, reset, synchronised and computed."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from torch import Tensor

from dream_trainer.host_values import to_host
from dream_trainer.trainer.metric_states import is_single_metric, merged_over_ranks, updated_metrics

if TYPE_CHECKING:
    from torchmetrics import Metric, MetricCollection

    from dream_trainer.trainer.base import BaseTrainer

    AnyMetric = Metric | MetricCollection


class MetricPhases:
    """Lets one attribute of the trainer serve training and validation without mixing them.

    ``trainer.accuracy`` is the copy of the phase under way: ``"train"``, ``"val"``, ``"test"``,
    and ``"filler"`` for batches that only keep ranks in step.

    Args:
        trainer: whose attributes are set.
    """

    def __init__(self, trainer: BaseTrainer) -> None:
        self._trainer = trainer
        self._originals: dict[str, AnyMetric] = {}
        self._phases: dict[str, dict[str, AnyMetric]] = {}
        self._current = ""

    def adopt(self, metrics: Mapping[str, AnyMetric]) -> None:
        """Take over metrics; the key is both the attribute and the name of the result."""
        self._originals = {
            name: metric.to(self._trainer.world.device) for name, metric in metrics.items()
        }
        self._phases = {}

    def enter(self, phase: str) -> None:
        """Make the copies of a phase the trainer's attributes."""
        if phase == self._current or not self._originals:
            return
        self._current = phase
        for name, metric in self._copies(phase).items():
            setattr(self._trainer, name, metric)

    def reset(self, phase: str) -> None:
        """Forget what a phase has seen."""
        for metric in self._copies(phase).values():
            metric.reset()

    def compute(self, phase: str) -> dict[str, float]:
        """Results over all ranks of the metrics that were updated in a phase.

        Returns:
            ``"phase/name"``, or ``"phase/name/part"`` for results of several values.
        """
        copies = self._copies(phase)
        with self._over_ranks(dict(_flat(copies))) as updated:
            values: dict[str, Any] = {}
            for name in sorted({path.partition(".")[0] for path in updated}):
                result = copies[name].compute()
                if isinstance(result, Mapping):
                    values |= {f"{phase}/{name}/{key}": value for key, value in result.items()}
                elif getattr(result, "ndim", 0):
                    values |= {f"{phase}/{name}/{i}": value for i, value in enumerate(result)}
                else:
                    values[f"{phase}/{name}"] = result
        return dict(zip(values, to_host(list(values.values())), strict=True))

    def end(self, phase: str) -> None:
        """End a phase that has no results."""

    def state_dict(self) -> dict[str, Any]:
        """What this rank's training metrics have gathered so far in the epoch."""
        return {
            path: {
                "counts": _counts(metric),
                "state": dict(metric.metric_state),
                "buffers": _buffers(metric),
            }
            for path, metric in self._training_metrics()
        } | {
            # What a metric keeps over many validations, its best value for example.
            f"val/{path}": {"counts": {}, "state": {}, "buffers": buffers}
            for path, metric in _flat(self._copies("val"))
            if (buffers := _buffers(metric))
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave; metrics it does not know stay as they are."""
        validating = [(f"val/{path}", metric) for path, metric in _flat(self._copies("val"))]
        for path, metric in (*self._training_metrics(), *validating):
            if path not in state:
                continue
            for name, value in (state[path]["state"] | state[path]["buffers"]).items():
                setattr(metric, name, _on_device(copy.deepcopy(value), metric))
            vars(metric).update(state[path]["counts"])
            metric._computed = None

    def _over_ranks(self, metrics: Mapping[str, Metric]) -> AbstractContextManager[set[str]]:
        world = self._trainer.world
        if world.size == 1:
            return nullcontext(updated_metrics(metrics))
        return merged_over_ranks(metrics, world.gather_data_parallel)

    def _training_metrics(self) -> Iterator[tuple[str, Metric]]:
        yield from _flat(self._copies("train"))
        # A module saves the states of metrics in it only if they are made persistent.
        for name, model in self._trainer.components.models.items():
            for path, part in model.named_modules(prefix=f"models.{name}"):
                if is_single_metric(part):
                    yield path, part

    def _copies(self, phase: str) -> dict[str, AnyMetric]:
        if phase not in self._phases:
            # Together, so that a metric made of others goes on reading those.
            self._phases[phase] = copy.deepcopy(self._originals)
        return self._phases[phase]


def _flat(metrics: Mapping[str, AnyMetric]) -> Iterator[tuple[str, Metric]]:
    """Every metric by its path, those inside collections and wrappers among them."""
    for name, metric in metrics.items():
        if not is_single_metric(metric):
            metric.items(keep_base=True, copy_state=True)  # members of a group share one state
        for path, part in metric.named_modules(prefix=name):
            if is_single_metric(part):
                yield path, part


def _counts(metric: Metric) -> dict[str, int]:
    """Numbers that a metric keeps beside its states: updates, values seen."""
    return {name: value for name, value in vars(metric).items() if type(value) is int}


def _buffers(metric: Metric) -> dict[str, Any]:
    """Tensors that a metric keeps beside its states, and that no reset forgets."""
    plain = {
        name: value
        for name, value in vars(metric).items()
        if isinstance(value, Tensor) and name[0] != "_" and name not in metric.metric_state
    }
    return plain | dict(metric.named_buffers(recurse=False))


def _on_device(value: Any, metric: Metric) -> Any:
    if isinstance(value, list):
        return [_on_device(item, metric) for item in value]
    return value.to(metric.device)
