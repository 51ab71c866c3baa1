"""What runs were, read from their directories, without their programs and without torch."""

from dream_trainer.reporting.goodput import Attempt, Goodput, measure_goodput
from dream_trainer.reporting.plots import plot_runs
from dream_trainer.reporting.run_report import MetricSummary, RunReport, report_run
from dream_trainer.reporting.timeline import Moment, read_timeline

__all__ = [
    "Attempt",
    "Goodput",
    "MetricSummary",
    "Moment",
    "RunReport",
    "measure_goodput",
    "plot_runs",
    "read_timeline",
    "report_run",
]
