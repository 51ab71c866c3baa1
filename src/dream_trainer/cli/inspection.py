"""``profile``, ``benchmark``, ``find-graph-breaks``: a few steps of a trainer, looked at."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dream_trainer.cli.messages import launched_rank
from dream_trainer.cli.tables import print_table, until_nobody_reads

if TYPE_CHECKING:
    from dream_trainer.cli.dream_cli import DreamCLI
    from dream_trainer.inspection import Benchmark, CompileReport, ProfiledRun

PROFILE_HELP = "profile a few steps, and tell where their time goes; trains nothing"
BENCHMARK_HELP = "tell how many steps and samples a second the trainer takes; trains nothing"
GRAPH_BREAKS_HELP = (
    "tell what keeps the models from being compiled as one graph, once; needs no compiler"
)


def add_profile_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that are no part of a configuration."""
    parser.add_argument(
        "--steps", type=int, default=3, metavar="N", help="steps in the trace (default: 3)"
    )
    parser.add_argument(
        "--warmup", type=int, default=15, metavar="N", help="steps before them (default: 15)"
    )
    parser.add_argument(
        "--output",
        metavar="FOLDER",
        help="where the trace goes (default: profile in the run directory of an experiment with a "
        "name, else in this folder)",
    )
    parser.add_argument("--shapes", action="store_true", help="also the shapes of tensors")
    parser.add_argument("--memory", action="store_true", help="also what is allocated and freed")
    parser.add_argument("--stacks", action="store_true", help="also the lines of Python; slow")
    parser.add_argument(
        "--synchronize",
        action="store_true",
        help="wait for the accelerator at every change of phase while phases are timed",
    )


def run_profile(cli: DreamCLI) -> ProfiledRun:
    """Profile, and print where the time goes and where the trace is."""
    # Here, because `--help` needs none of it.
    from dream_trainer.inspection import profile_run

    given, config = cli.own, cli.config
    folder = Path("profile")
    if given.output is not None:
        folder = Path(given.output)
    elif config.experiment is not None:
        names = (config.root_dir, config.project, config.group, config.experiment)
        folder = Path(*names, "profile")
    with _apart():
        found = profile_run(
            cli.trainer_class,
            config,
            folder,
            steps=given.steps,
            warmup=given.warmup,
            synchronize=given.synchronize,
            record_shapes=given.shapes,
            profile_memory=given.memory,
            with_stack=given.stacks,
        )
    _print(str(found))
    return found


def add_benchmark_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that are no part of a configuration."""
    parser.add_argument(
        "--steps", type=int, default=20, metavar="N", help="steps to time (default: 20)"
    )
    parser.add_argument(
        "--warmup", type=int, default=5, metavar="N", help="steps before them (default: 5)"
    )
    parser.add_argument(
        "--cached_batch",
        "--cached-batch",
        action="store_true",
        help="time the steps again with one batch that stays in memory: the difference is what "
        "the loader costs",
    )


def run_benchmark(cli: DreamCLI) -> list[Benchmark]:
    """Time, and print a short table."""
    from dream_trainer.inspection import benchmark

    given, found = cli.own, []
    for is_cached in (False, True) if given.cached_batch else (False,):
        with _apart():
            one = benchmark(
                cli.trainer_class,
                cli.config,
                steps=given.steps,
                warmup=given.warmup,
                cached_batch=is_cached,
            )
        found.append(one)
    if launched_rank() != 0:
        return found
    columns = ("batches", "steps/s", "ms/step", "samples/s")
    rows = [
        (
            "the same" if one.is_cached else "loader's",
            f"{one.steps_per_second:.4g}",
            f"{1000 / one.steps_per_second:.4g}",
            "-" if one.samples_per_second is None else f"{one.samples_per_second:,.0f}",
        )
        for one in found
    ]
    with until_nobody_reads():
        print_table(columns, rows, right=columns[1:])
        first = found[0]
        ranks = f"{first.ranks} rank{'s' * (first.ranks != 1)}"
        print(f"{first.steps} steps after {given.warmup} to warm up, {ranks}, {first.device}")
    return found


def add_graph_breaks_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that are no part of a configuration."""
    parser.add_argument(
        "--batches", type=int, default=4, metavar="N", help="batches to train on (default: 4)"
    )
    parser.add_argument(
        "--as_they_are",
        "--as-they-are",
        action="store_true",
        help="do not cut the last two batches, which shows what other shapes cause",
    )


def run_find_graph_breaks(cli: DreamCLI) -> CompileReport:
    """Compile, and print what was found."""
    from dream_trainer.inspection import find_graph_breaks

    with _apart():
        report = find_graph_breaks(
            cli.trainer_class,
            cli.config,
            batches=cli.own.batches,
            vary_shapes=not cli.own.as_they_are,
        )
    _print(str(report))
    return report


@contextlib.contextmanager
def _apart() -> Iterator[None]:
    """What a trainer prints would come between the numbers."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def _print(text: str) -> None:
    if launched_rank() == 0:
        with until_nobody_reads():
            print(text)
