"""``report``: what runs were, how they ended, and how several compare."""

from __future__ import annotations

import argparse


def add_report_command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], prog: str
) -> None:
    """Add the parser of ``report``."""


def report(given: argparse.Namespace) -> None:
    """Report."""
