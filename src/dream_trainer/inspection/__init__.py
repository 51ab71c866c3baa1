"""A trainer looked at from inside: a few steps of it, run and thrown away."""

from dream_trainer.inspection.graph_breaks import CompileReport, find_graph_breaks
from dream_trainer.inspection.profiling import ProfiledRun, profile_run
from dream_trainer.inspection.speed import Benchmark, benchmark

__all__ = [
    "Benchmark",
    "CompileReport",
    "ProfiledRun",
    "benchmark",
    "find_graph_breaks",
    "profile_run",
]
