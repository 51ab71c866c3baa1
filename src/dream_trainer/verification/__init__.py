"""Whether a trainer resumes exactly: its own run, killed at every step and started again."""

from dream_trainer.verification.report import Difference, ResumeReport
from dream_trainer.verification.verify import verify_resume

__all__ = ["Difference", "ResumeReport", "verify_resume"]
