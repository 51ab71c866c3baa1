"""Schedules: shapes of learning rates, warm-up, and when a scheduler steps."""

from dream_trainer.schedules.new_groups import (
    follow_new_groups,
    load_scheduler_state,
    scale_rates,
)
from dream_trainer.schedules.schedule import Schedule
from dream_trainer.schedules.shapes import (
    cosine,
    inverse_square_root,
    linear,
    warm_up_stable_decay,
)
from dream_trainer.schedules.warm_up import WarmUp, warm_up

__all__ = [
    "Schedule",
    "WarmUp",
    "cosine",
    "follow_new_groups",
    "inverse_square_root",
    "linear",
    "load_scheduler_state",
    "scale_rates",
    "warm_up",
    "warm_up_stable_decay",
]
