"""Checkpoints of a run: what is in them, where they are, which are kept."""

from dream_trainer.checkpointing.checkpointer import Checkpointer, LoadedCheckpoint
from dream_trainer.checkpointing.export import export_checkpoint
from dream_trainer.checkpointing.store import CheckpointStore, StoredCheckpoint

__all__ = [
    "CheckpointStore",
    "Checkpointer",
    "LoadedCheckpoint",
    "StoredCheckpoint",
    "export_checkpoint",
]
