"""What the ranks of a run tell each other beside its collectives: failures, and when to stop."""

from dream_trainer.coordination.agreement import StopAgreement
from dream_trainer.coordination.failure import RankFailedError, RankFailure
from dream_trainer.coordination.interruption import Interrupted, Interruption, Preempted
from dream_trainer.coordination.place import CountingPlace, Place
from dream_trainer.coordination.watch import RankWatch

__all__ = [
    "CountingPlace",
    "Interrupted",
    "Interruption",
    "Place",
    "Preempted",
    "RankFailedError",
    "RankFailure",
    "RankWatch",
    "StopAgreement",
]
