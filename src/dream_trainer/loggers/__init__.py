"""Where metrics go: the exact JSONL log, and any logger with Lightning's methods."""

from dream_trainer.loggers.jsonl import JsonlLog
from dream_trainer.loggers.protocol import Logger
from dream_trainer.loggers.tensorboard import purge_after

__all__ = ["JsonlLog", "Logger", "purge_after"]
