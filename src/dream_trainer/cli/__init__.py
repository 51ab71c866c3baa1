"""The command line: ``DreamCLI`` for scripts, ``main`` for the ``dream-trainer`` command."""

from dream_trainer.cli.commands import Command
from dream_trainer.cli.dream_cli import DreamCLI
from dream_trainer.cli.main import main

__all__ = ["Command", "DreamCLI", "main"]
