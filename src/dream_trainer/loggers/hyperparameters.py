"""A run's configuration, and what came of it, for loggers that have a place for them."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any


def log_hyperparameters(logger: Any, parameters: Mapping[str, Any]) -> None:
    """Give a logger the configuration at the start of a run; one that refuses it ends nothing.

    Args:
        logger: with Lightning's ``log_hyperparams``, or without.
        parameters: plain data by name.
    """
    method = getattr(logger, "log_hyperparams", None)
    if method is None:
        return
    # TensorBoard shows the metrics of the first call alone, and there are none yet.
    options: dict[str, Any] = {"metrics": {}} if "metrics" in _arguments(method) else {}
    _told(logger, lambda: method(dict(parameters), **options))


def log_outcome(
    logger: Any, parameters: Mapping[str, Any], outcome: Mapping[str, float], step: int
) -> None:
    """Give a logger what came of the configuration, for tables of runs.

    That is TensorBoard's page of hyperparameters and the summary of Weights & Biases; other
    loggers show the last value of a metric by themselves.

    Args:
        logger: any.
        parameters: those of `log_hyperparameters`.
        outcome: values by name.
        step: optimizer steps taken.
    """
    method = getattr(logger, "log_hyperparams", None)
    if method is None:
        return
    arguments = _arguments(method)
    if "metrics" in arguments:
        options = {"step": step} if "step" in arguments else {}
        _told(logger, lambda: method(dict(parameters), metrics=dict(outcome), **options))
        return
    summary: Any = getattr(getattr(logger, "experiment", None), "summary", None)
    if hasattr(summary, "update"):
        _told(logger, lambda: summary.update(dict(outcome)))


def _arguments(method: Any) -> Mapping[str, Any]:
    try:
        return inspect.signature(method).parameters
    except (TypeError, ValueError):
        return {}


def _told(logger: Any, call: Callable[[], object]) -> None:
    try:
        call()
    except NotImplementedError:
        return  # Fabric's CSVLogger has the method, and no place for them
    except Exception as error:  # noqa: BLE001 - of any library; the run is worth more
        name = type(logger).__name__
        text = f"{name} did not take the hyperparameters: {type(error).__name__}: {error}"
        warnings.warn(text, RuntimeWarning, stacklevel=2)
