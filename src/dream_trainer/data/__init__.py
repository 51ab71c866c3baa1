"""Loaders that know where they are and continue there."""

from dream_trainer.data.resumable_loader import ResumableLoader

__all__ = ["ResumableLoader"]
