"""Where metrics go: the exact JSONL log, and any logger with Lightning's methods."""

from dream_trainer.loggers.hyperparameters import log_hyperparameters, log_outcome
from dream_trainer.loggers.jsonl import LOG_NAME, JsonlLog
from dream_trainer.loggers.protocol import Logger
from dream_trainer.loggers.tensorboard import purge_after
from dream_trainer.loggers.timeline import TIMELINE_NAME, TimelineFile

__all__ = [
    "LOG_NAME",
    "TIMELINE_NAME",
    "JsonlLog",
    "Logger",
    "TimelineFile",
    "log_hyperparameters",
    "log_outcome",
    "purge_after",
]
