"""Values that are found by trying: a learning rate, a batch size."""

from dream_trainer.tuning.batch_size import find_batch_size
from dream_trainer.tuning.batch_size_result import BatchSizeResult, Trial
from dream_trainer.tuning.learning_rate import find_learning_rate
from dream_trainer.tuning.learning_rate_result import LearningRateResult

__all__ = [
    "BatchSizeResult",
    "LearningRateResult",
    "Trial",
    "find_batch_size",
    "find_learning_rate",
]
