"""Values that are found by trying: a learning rate, a batch size."""

from dream_trainer.tuning.learning_rate import find_learning_rate
from dream_trainer.tuning.learning_rate_result import LearningRateResult

__all__ = ["LearningRateResult", "find_learning_rate"]
