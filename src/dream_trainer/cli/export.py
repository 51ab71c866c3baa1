"""``checkpoints export``, and ``export`` for short: the weights of a checkpoint as one file."""

from __future__ import annotations

import argparse

_HELP = "write the weights of a checkpoint to one file"


def add_export_command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], prog: str
) -> None:
    """Add the parser of ``export`` to those of the other commands."""
    parser = commands.add_parser(
        "export", prog=f"{prog} export", help=_HELP, description=_HELP, allow_abbrev=False
    )
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="a checkpoint, or a run for its newest whole one"
    )
    parser.add_argument("file", metavar="FILE", help="ends in .safetensors, .pt, .pth or .ckpt")
    parser.add_argument("--model", help="the one model to export, if there are several")
    parser.add_argument(
        "--weights",
        metavar="NAME",
        help="write the averages of this callback, ema for example, where it has some",
    )
    parser.add_argument(
        "--whole_state", action="store_true", help="everything a run resumes from; .pt only"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace FILE if it exists")


def export(given: argparse.Namespace) -> None:
    """Run ``export`` with what its parser read.

    Raises:
        CheckpointError, ConfigError: as `export_checkpoint`.
    """
    # Here, because `dream-trainer --help` must not wait for torch.
    from dream_trainer.checkpointing import export_checkpoint

    path = export_checkpoint(
        given.checkpoint,
        given.file,
        model=given.model,
        weights=given.weights,
        whole_state=given.whole_state,
        overwrite=given.overwrite,
    )
    print(f"{path}: {path.stat().st_size} bytes")
