"""For tests of your own callbacks and trainers: a tiny trainer, ranks, states to the bit."""

from dream_trainer.testing.ranks import RankError, free_port, rank_environment, run_ranks
from dream_trainer.testing.recording import Call, RecordingCallback
from dream_trainer.testing.states import differences, exact_state, flat_state
from dream_trainer.testing.tiny import Points, TinyConfig, TinyTrainer, tiny_config, tiny_trainer

__all__ = [
    "Call",
    "Points",
    "RankError",
    "RecordingCallback",
    "TinyConfig",
    "TinyTrainer",
    "differences",
    "exact_state",
    "flat_state",
    "free_port",
    "rank_environment",
    "run_ranks",
    "tiny_config",
    "tiny_trainer",
]
