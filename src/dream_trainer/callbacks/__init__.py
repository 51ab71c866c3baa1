"""Callbacks: code that runs at named moments of a run."""

from dream_trainer.callbacks.accumulation_scheduler import GradientAccumulationScheduler
from dream_trainer.callbacks.callback import HOOKS, Callback
from dream_trainer.callbacks.callback_list import CallbackList
from dream_trainer.callbacks.checkpoint import CheckpointCallback
from dream_trainer.callbacks.early_stopping import EarlyStopping
from dream_trainer.callbacks.ema import EMA
from dream_trainer.callbacks.garbage_collection import GarbageCollection
from dream_trainer.callbacks.gradient_norms import GradNormMonitor
from dream_trainer.callbacks.histograms import Histograms
from dream_trainer.callbacks.learning_rate import LearningRateMonitor
from dream_trainer.callbacks.memory_monitor import MemoryMonitor
from dream_trainer.callbacks.metric_logger import MetricLogger
from dream_trainer.callbacks.prediction_writer import PredictionWriter
from dream_trainer.callbacks.profiler import Profiler
from dream_trainer.callbacks.progress_bar import ProgressBar
from dream_trainer.callbacks.run_summary import RunSummary
from dream_trainer.callbacks.step_times import StepTimes
from dream_trainer.callbacks.swa import SWA
from dream_trainer.callbacks.throughput import Throughput
from dream_trainer.callbacks.timeline import Timeline
from dream_trainer.callbacks.unfreezing import Unfreeze, Unfreezing
from dream_trainer.callbacks.weight_averaging import WeightAveraging

__all__ = [
    "EMA",
    "HOOKS",
    "SWA",
    "Callback",
    "CallbackList",
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
]
