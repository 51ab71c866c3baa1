"""``checkpoints prune``: what would be deleted, and with ``--yes`` deleting it."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dream_trainer.checkpointing import StoredCheckpoint
from dream_trainer.checkpointing.inventory import RunFolder, stored
from dream_trainer.checkpointing.places import find_runs
from dream_trainer.checkpointing.pruning import Pruning, carry_out, nobody_trains, plan_pruning
from dream_trainer.cli.tables import moment, number, print_heading, print_table
from dream_trainer.configs import CheckpointParameters
from dream_trainer.errors import ConfigError
from dream_trainer.storage.sizes import size
from dream_trainer.words import counted


def prune(given: argparse.Namespace) -> None:
    """List what the rules do not keep; delete it with ``--yes``."""
    run = _run_at(Path(given.run))
    rules = _rules(run, given)
    print_heading(f"{run.directory}: keep {_in_words(rules)}")
    deletes = given.yes and not given.dry_run
    with nobody_trains(run.directory) if deletes else contextlib.nullcontext():
        plan = plan_pruning(run, rules)
        if deletes:
            for one in carry_out(plan, run, rules):
                print(f"deleted {one.path.name}, {size(one.manifest.num_bytes)}", flush=True)
            print(f"deleted {_in_all(plan.doomed)}")
        else:
            _print_plan(plan)
    print(f"kept: {', '.join(one.path.name for one in plan.kept)}")
    for damaged in plan.damaged:
        why = "; ".join(damaged.problems) or "a file does not match its checksum"
        print(f"left alone: {damaged.path.name} is damaged ({why})")
    if plan.doomed and not deletes:
        print("Nothing was deleted. Add --yes to delete.")


def _print_plan(plan: Pruning) -> None:
    if plan.doomed:
        rows = [
            (
                one.path.name,
                str(one.manifest.step),
                size(one.manifest.num_bytes),
                moment(one.manifest.saved_at),
                number(one.manifest.monitored),
            )
            for one in plan.doomed
        ]
        columns = ("Would go", "Step", "Size", "Saved (UTC)", "Monitored")
        print_table(columns, rows, ("Step", "Size", "Monitored"))
    print(f"would delete {_in_all(plan.doomed)}")


def _in_all(checkpoints: Sequence[StoredCheckpoint]) -> str:
    freed = size(sum(one.manifest.num_bytes for one in checkpoints))
    return f"{counted(len(checkpoints), 'checkpoint')}, {freed}"


def _run_at(place: Path) -> RunFolder:
    runs = find_runs(place)
    if len(runs) > 1:
        raise ConfigError(
            str(place),
            [f"{len(runs)} runs are below it"],
            f"Give one of them, {runs[0].directory} for example.",
        )
    if runs[0].only is not None:
        raise ConfigError(
            str(place), ["it is one checkpoint"], f"Give the run, {runs[0].directory}."
        )
    return runs[0]


def _rules(run: RunFolder, given: argparse.Namespace) -> CheckpointParameters:
    """What was given, then what the run's own configuration says, then the defaults.

    Raises:
        ConfigError: with all problems of the options.
    """
    rules = run.recorded or CheckpointParameters(keep_top_k=0)
    problems = []
    if run.recorded is None and given.mode is not None:
        newest = next(reversed(stored(run.checkpoints())), None)
        monitor = newest.manifest.monitor if newest else None
        rules = replace(rules, mode=given.mode, monitor=monitor)
    elif given.mode not in (None, rules.mode):
        problems.append(f"--mode {given.mode}, but config.yaml of the run says {rules.mode}")
    top = getattr(given, "keep_top_k", None)
    if top and rules.monitor is None:
        why = "the run has no monitor" if run.recorded else "add --mode min, or --mode max"
        problems.append(f"--keep_top_k {top}: nothing says which one is best; {why}")
    names = ("keep_last", "keep_top_k", "keep_every_n_steps")
    options = {name: getattr(given, name) for name in names if hasattr(given, name)}
    try:
        rules = replace(rules, **options)
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError("prune", problems, "Nothing was deleted.")
    return rules


def _in_words(rules: CheckpointParameters) -> str:
    parts = [f"the newest {rules.keep_last}"]
    if rules.monitor is not None and rules.keep_top_k:
        parts.append(f"the best {rules.keep_top_k} ({rules.mode} {rules.monitor})")
    if rules.keep_every_n_steps:
        parts.append(f"every multiple of {rules.keep_every_n_steps} steps")
    return ", ".join(parts)
