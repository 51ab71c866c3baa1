"""States of torchmetrics, merged over ranks so that each sample counts once."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from typing_extensions import TypeIs

if TYPE_CHECKING:
    from torchmetrics import Metric, MetricCollection

#: Of one metric: how often it was updated, and its states by name.
Gathered = tuple[int, dict[str, Any]]
Gather = Callable[[dict[str, Gathered]], list[dict[str, Gathered]]]


def is_metric(value: object) -> TypeIs[Metric | MetricCollection]:
    """Whether it is one of torchmetrics', or a collection of them."""
    return is_single_metric(value) or isinstance(value, _kind("torchmetrics", "MetricCollection"))


def is_single_metric(value: object) -> TypeIs[Metric]:
    """Whether it is one of torchmetrics', and no collection."""
    return isinstance(value, _kind("torchmetrics", "Metric"))


def updated_metrics(metrics: Mapping[str, Metric]) -> set[str]:
    """Paths of the metrics that were updated; what wraps others has no states of its own."""
    return {
        path for path, metric in metrics.items() if metric.update_called and not _is_wrapper(metric)
    }


@contextmanager
def merged_over_ranks(metrics: Mapping[str, Metric], gather: Gather) -> Iterator[set[str]]:
    """Let metrics hold the states of all ranks in the block. One collective.

    torchmetrics' own way takes one for each state, and a rank without samples has nothing of the
    right type to bring to them; it would also count twice what tensor-parallel ranks share.

    Args:
        metrics: by path, the same paths on every rank.
        gather: gives the value of every rank that has samples of its own, in their order.

    Yields:
        Paths of the metrics that some rank has updated.
    """
    ranks = gather({path: _gathered(metrics[path]) for path in updated_metrics(metrics)})
    updated = {path for rank in ranks for path in rank}
    settings = ("_to_sync", "_update_count", "_computed")
    before = {
        path: {name: getattr(metric, name) for name in (*settings, *metric.metric_state)}
        for path, metric in metrics.items()
    }
    try:
        for path, metric in metrics.items():
            metric._to_sync = False  # also of those inside wrappers, which compute them
            if path in updated:
                _hold(metric, [rank[path] for rank in ranks if path in rank])
        yield updated
    finally:
        for path, values in before.items():
            for name, value in values.items():
                setattr(metrics[path], name, value)


def _is_wrapper(metric: Metric) -> bool:
    return isinstance(metric, _kind("torchmetrics.wrappers.abstract", "WrapperMetric"))


def _kind(module: str, name: str) -> Any:
    """A class of torchmetrics; what nothing is an instance of, if nobody has loaded that."""
    return getattr(sys.modules.get(module), name, ())


def _gathered(metric: Metric) -> Gathered:
    return metric._update_count, _moved(metric.metric_state, torch.device("cpu"))


def _hold(metric: Metric, ranks: Sequence[Gathered]) -> None:
    for name, reduction in metric._reductions.items():
        states = [_moved(state[name], metric.device) for _, state in ranks]
        setattr(metric, name, _merged(states, reduction))
    metric._update_count = sum(count for count, _ in ranks)
    metric._computed = None


def _merged(states: Sequence[Any], reduction: Any) -> Any:
    """One state over ranks, in their order, as its ``dist_reduce_fx`` says."""
    if len(states) == 1:
        return states[0]
    if isinstance(states[0], Tensor):
        together: Any = torch.stack(list(states))
    else:
        together = [item for state in states for item in state]
    return reduction(together) if reduction is not None and len(together) else together


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to(device)
    if isinstance(value, Mapping):
        return {key: _moved(one, device) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_moved(one, device) for one in value]
    return value
