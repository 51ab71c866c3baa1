"""What runs were, read from their directories, without their programs and without torch."""

from dream_trainer.reporting.run_report import MetricSummary, RunReport, report_run

__all__ = ["MetricSummary", "RunReport", "report_run"]
