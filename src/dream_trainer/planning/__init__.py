"""What a configuration means on any number of ranks, told by one process."""

from dream_trainer.planning.planner import plan_run
from dream_trainer.planning.run_plan import RunPlan

__all__ = ["RunPlan", "plan_run"]
