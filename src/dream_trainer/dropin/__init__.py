"""What a script with a loop of its own takes from the trainer: exact resume, saves, the log."""

from dream_trainer.dropin.resumable_run import ResumableRun

__all__ = ["ResumableRun"]
