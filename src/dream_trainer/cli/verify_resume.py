"""``verify-resume``: whether a trainer resumes exactly, from the command line."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dream_trainer.cli.dream_cli import DreamCLI

VERIFY_RESUME_HELP = (
    "run a few steps straight, and killed and resumed at every one; tell whether all agree"
)


def add_verify_resume_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that are no part of a configuration."""
    parser.add_argument(
        "--steps", type=int, default=6, metavar="N", help="optimizer steps of a run (default: 6)"
    )
    parser.add_argument(
        "--every", type=int, default=1, metavar="K", help="kill after every K-th (default: 1)"
    )
    parser.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="PATH",
        help="a value that may differ, as the report names it; may be repeated",
    )
    parser.add_argument(
        "--start_method", choices=("fork", "spawn"), help="how the processes of the runs start"
    )


def run_verify_resume(cli: DreamCLI) -> Any:
    """Verify, print the report, and end with status 1 if the trainer is not exact."""
    # Here, because `--help` needs none of it.
    from dream_trainer.verification import verify_resume

    report = verify_resume(
        cli.trainer_class,
        cli.config,
        steps=cli.own.steps,
        every=cli.own.every,
        ignore=cli.own.ignore,
        start_method=cli.own.start_method,
    )
    print(report)
    if not report.is_exact:
        raise SystemExit(1)
    return report
