"""The trainer layer that Lightning Fabric never had.

Public names load on first use, so ``import dream_trainer`` costs neither torch nor lightning.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dream_trainer.callbacks import (
        EMA,
        SWA,
        Callback,
        CheckpointCallback,
        EarlyStopping,
        GarbageCollection,
        GradientAccumulationScheduler,
        GradNormMonitor,
        Histograms,
        LearningRateMonitor,
        MemoryMonitor,
        MetricLogger,
        PredictionWriter,
        Profiler,
        ProgressBar,
        RunSummary,
        StepTimes,
        Throughput,
        Timeline,
        Unfreeze,
        Unfreezing,
        WeightAveraging,
    )
    from dream_trainer.checkpointing import Checkpointer, export_checkpoint
    from dream_trainer.cli import Command, DreamCLI
    from dream_trainer.configs import (
        CheckpointParameters,
        DeviceParameters,
        Duration,
        Link,
        Size,
        TrainingParameters,
    )
    from dream_trainer.data import ResumableLoader
    from dream_trainer.dropin import ResumableRun
    from dream_trainer.inspection import (
        Benchmark,
        CompileReport,
        ProfiledRun,
        benchmark,
        find_graph_breaks,
        profile_run,
    )
    from dream_trainer.lightning_modules import (
        LightningModuleTrainer,
        LightningModuleTrainerConfig,
    )
    from dream_trainer.planning import RunPlan, plan_run
    from dream_trainer.predictions import Predictions, read_predictions
    from dream_trainer.reporting import plot_runs
    from dream_trainer.schedules import Schedule, warm_up
    from dream_trainer.trainer import (
        AbstractTrainer,
        AbstractTrainerConfig,
        BaseTrainer,
        BaseTrainerConfig,
        DreamTrainer,
        DreamTrainerConfig,
    )
    from dream_trainer.tuning import (
        BatchSizeResult,
        LearningRateResult,
        find_batch_size,
        find_learning_rate,
    )
    from dream_trainer.verification import ResumeReport, verify_resume
    from dream_trainer.world import DreamFabric, DreamWorld, MeshStrategy

__version__ = "0.1.0"

_HOMES = {
    "callbacks": (
        "EMA",
        "SWA",
        "Callback",
        "CheckpointCallback",
        "EarlyStopping",
        "GarbageCollection",
        "GradNormMonitor",
        "GradientAccumulationScheduler",
        "Histograms",
        "LearningRateMonitor",
        "MemoryMonitor",
        "MetricLogger",
        "PredictionWriter",
        "Profiler",
        "ProgressBar",
        "RunSummary",
        "StepTimes",
        "Throughput",
        "Timeline",
        "Unfreeze",
        "Unfreezing",
        "WeightAveraging",
    ),
    "checkpointing": ("Checkpointer", "export_checkpoint"),
    "cli": ("Command", "DreamCLI"),
    "configs": (
        "CheckpointParameters",
        "DeviceParameters",
        "Duration",
        "Link",
        "Size",
        "TrainingParameters",
    ),
    "data": ("ResumableLoader",),
    "dropin": ("ResumableRun",),
    "inspection": (
        "Benchmark",
        "CompileReport",
        "ProfiledRun",
        "benchmark",
        "find_graph_breaks",
        "profile_run",
    ),
    "lightning_modules": ("LightningModuleTrainer", "LightningModuleTrainerConfig"),
    "planning": ("RunPlan", "plan_run"),
    "predictions": ("Predictions", "read_predictions"),
    "reporting": ("plot_runs",),
    "schedules": ("Schedule", "warm_up"),
    "trainer": (
        "AbstractTrainer",
        "AbstractTrainerConfig",
        "BaseTrainer",
        "BaseTrainerConfig",
        "DreamTrainer",
        "DreamTrainerConfig",
    ),
    "tuning": ("BatchSizeResult", "LearningRateResult", "find_batch_size", "find_learning_rate"),
    "verification": ("ResumeReport", "verify_resume"),
    "world": ("DreamFabric", "DreamWorld", "MeshStrategy"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "EMA",
    "SWA",
    "AbstractTrainer",
    "AbstractTrainerConfig",
    "BaseTrainer",
    "BaseTrainerConfig",
    "BatchSizeResult",
    "Benchmark",
    "Callback",
    "CheckpointCallback",
    "CheckpointParameters",
    "Checkpointer",
    "Command",
    "CompileReport",
    "DeviceParameters",
    "DreamCLI",
    "DreamFabric",
    "DreamTrainer",
    "DreamTrainerConfig",
    "DreamWorld",
    "Duration",
    "EarlyStopping",
    "GarbageCollection",
    "GradNormMonitor",
    "GradientAccumulationScheduler",
    "Histograms",
    "LearningRateMonitor",
    "LearningRateResult",
    "LightningModuleTrainer",
    "LightningModuleTrainerConfig",
    "Link",
    "MemoryMonitor",
    "MeshStrategy",
    "MetricLogger",
    "PredictionWriter",
    "Predictions",
    "ProfiledRun",
    "Profiler",
    "ProgressBar",
    "ResumableLoader",
    "ResumableRun",
    "ResumeReport",
    "RunPlan",
    "RunSummary",
    "Schedule",
    "Size",
    "StepTimes",
    "Throughput",
    "Timeline",
    "TrainingParameters",
    "Unfreeze",
    "Unfreezing",
    "WeightAveraging",
    "benchmark",
    "export_checkpoint",
    "find_batch_size",
    "find_graph_breaks",
    "find_learning_rate",
    "plan_run",
    "plot_runs",
    "profile_run",
    "read_predictions",
    "verify_resume",
    "warm_up",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
