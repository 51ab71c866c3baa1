"""Checkpoints of a run: what is in them, where they are, which are kept."""

from typing import TYPE_CHECKING

from dream_trainer.lazy_names import lazy_names

if TYPE_CHECKING:
    from dream_trainer.checkpointing.checkpointer import Checkpointer, LoadedCheckpoint
    from dream_trainer.checkpointing.export import export_checkpoint
    from dream_trainer.checkpointing.store import CheckpointStore, StoredCheckpoint

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "checkpointer": "Checkpointer LoadedCheckpoint",
        "export": "export_checkpoint",
        "store": "CheckpointStore StoredCheckpoint",
    },
    globals(),
)

__all__ = [
    "CheckpointStore",
    "Checkpointer",
    "LoadedCheckpoint",
    "StoredCheckpoint",
    "export_checkpoint",
]
