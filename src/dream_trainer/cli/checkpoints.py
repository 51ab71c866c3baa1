"""``checkpoints``: the commands that look at checkpoints, check, compare and tidy them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from dream_trainer.cli.export import add_export_command, export
from dream_trainer.cli.tables import until_nobody_reads

_HELP = "list, show, verify, compare, export and prune checkpoints"
_CHECKPOINT = "a checkpoint, or a run for its newest whole one"
_JSON = "plain data for programs, sizes in bytes"


def add_checkpoints_command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], prog: str
) -> None:
    """Add the parser of ``checkpoints`` to those of the other commands."""
    parser = commands.add_parser(
        "checkpoints", prog=f"{prog} checkpoints", help=_HELP, description=_HELP, allow_abbrev=False
    )
    prog = f"{prog} checkpoints"
    own = parser.add_subparsers(dest="checkpoints_command", metavar="COMMAND", required=True)

    def add(name: str, words: str, *, json: bool = False) -> argparse.ArgumentParser:
        one = own.add_parser(
            name, prog=f"{prog} {name}", help=words, description=words, allow_abbrev=False
        )
        if json:
            one.add_argument("--json", action="store_true", help=_JSON)
        return one

    listing = add("ls", "list checkpoints; checksums are not looked at", json=True)
    listing.add_argument(
        "places",
        metavar="RUN",
        nargs="*",
        default=["runs"],
        help="a run's directory, or a directory of runs (default: runs)",
    )
    show = add("show", "tell what is in a checkpoint; reads no weights", json=True)
    show.add_argument("checkpoint", metavar="CHECKPOINT", help=_CHECKPOINT)
    show.add_argument(
        "--depth", type=_depth, default=3, metavar="N", help="levels to show, or 'all' (default: 3)"
    )
    verify = add("verify", "compare sizes and checksums of all files with the manifests")
    verify.add_argument(
        "places", metavar="PATH", nargs="+", help="a checkpoint, a run, or a directory of runs"
    )
    _add_diff(add("diff", "compare two checkpoints: 0 the same, 1 different, 2 trouble", json=True))
    add_export_command(own, prog)
    _add_prune(add("prune", "delete checkpoints that the rules do not keep"))


def _add_diff(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("one", metavar="A", help=_CHECKPOINT)
    parser.add_argument("other", metavar="B", help=_CHECKPOINT)
    parser.add_argument(
        "--only",
        action="append",
        choices=("manifest", "config", "state"),
        help="compare this alone; can be given again (default: all three)",
    )


def _add_prune(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="the run's directory")
    rules = parser.add_argument_group(
        "rules", "What any of them keeps stays. Rules not given are those of the run's config.yaml."
    )
    for option, metavar, kind, words in (
        ("--keep_last", "N", int, "the newest N; at least 1"),
        ("--keep_top_k", "K", int, "the best K"),
        ("--keep_every_n_steps", "M", _number_or_none, "those at a multiple of M steps, or 'none'"),
    ):
        # Left out is not the same as none.
        rules.add_argument(
            option, type=kind, metavar=metavar, default=argparse.SUPPRESS, help=words
        )
    rules.add_argument(
        "--mode", choices=("min", "max"), help="whether a smaller or a larger value is the best"
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="only list what would be deleted, as without --yes"
    )
    parser.add_argument("--yes", action="store_true", help="delete")


def checkpoints(given: argparse.Namespace) -> None:
    """Run what the parser of ``checkpoints`` read.

    Raises:
        SystemExit: 1 if ``verify`` finds damage or ``diff`` a difference, 2 if ``diff`` cannot
            compare.
        ConfigError: a path or an option is wrong.
        CheckpointError: a checkpoint cannot be used.
    """
    # Here, because `--help` needs none of it, and most of it needs no torch.
    from dream_trainer.cli import checkpoint_content, checkpoint_listing, checkpoint_pruning

    run: dict[str, Callable[[argparse.Namespace], int | None]] = {
        "ls": checkpoint_listing.ls,
        "verify": checkpoint_listing.verify,
        "show": checkpoint_content.show,
        "diff": checkpoint_content.diff,
        "prune": checkpoint_pruning.prune,
        "export": _export,
    }
    with until_nobody_reads():
        status = run[given.checkpoints_command](given)
    if status:
        raise SystemExit(status)


def _export(given: argparse.Namespace) -> None:
    from dream_trainer.checkpointing.places import missing

    if not Path(given.checkpoint).exists():
        raise missing(Path(given.checkpoint))
    export(given)


def _depth(text: str) -> int | None:
    if text == "all":
        return None
    if not text.isdecimal() or text == "0":
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number above 0 nor 'all'")
    return int(text)


def _number_or_none(text: str) -> int | None:
    if text.lower() in ("none", "null"):
        return None
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor 'none'") from None
