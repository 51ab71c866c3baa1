"""What a loop adds to a training step that is almost no work, against other tools' loops.

    python tests/benchmarks/bench_steps.py [--rounds 15] [--scenario NAME]

Above plain PyTorch, in microseconds, and as shares of what Fabric and Lightning's Trainer add.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import logging
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist
from rounds import Spread, Target, interleaved, per_round, report
from training import (
    FABRIC,
    LIGHTNING,
    OURS,
    OURS_AS_IT_IS,
    PLAIN,
    TOOLS,
    Scenario,
    microseconds_of_a_batch,
)

SCENARIOS = {
    one.name: one
    for one in (
        Scenario("one device"),
        Scenario("accumulation 4", accumulate=4),
        Scenario("clipping", clip=1.0),
        Scenario("bf16-mixed", precision="bf16-mixed"),
        Scenario("2 DDP ranks", ranks=2),
    )
}
#: Module that a tool needs, where it is not one of ours.
NEEDS = {"Ignite": "ignite", "Accelerate": "accelerate"}
Times = dict[str, list[float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--scenario", choices=SCENARIOS)
    options = parser.parse_args()
    if "RANK" in os.environ:
        run_rank(SCENARIOS[options.scenario], options.rounds)
        return
    names = [options.scenario] if options.scenario else list(SCENARIOS)
    values, targets = {}, []
    with tempfile.TemporaryDirectory(prefix="bench-steps-") as folder, contextlib.chdir(folder):
        for name in names:
            scenario = SCENARIOS[name]
            measured = on_ranks if scenario.ranks > 1 else measure
            times = measured(scenario, options.rounds)
            values[name] = table(name, times)
            targets += promises(name, times)
    if options.scenario is None:
        report("steps", values, targets)
    else:  # what is kept is about all of them
        print(*targets, sep="\n")


def measure(scenario: Scenario, rounds: int) -> Times:
    """Microseconds of a batch by tool, a value a round."""
    torch.set_num_threads(1)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    there = [name for name in TOOLS if name not in NEEDS or find_spec(NEEDS[name])]
    measured = 1_000 if scenario.ranks == 1 else 3_000  # what ranks wait for is felt by caches, too
    ways = {
        name: functools.partial(microseconds_of_a_batch, name, scenario, measured=measured)
        for name in there
    }
    return interleaved(ways, rounds)


def on_ranks(scenario: Scenario, rounds: int) -> Times:
    """The same on several processes, as torchrun starts them; rank 0's times."""
    words = ["--standalone", "--nproc_per_node", str(scenario.ranks), str(Path(__file__).resolve())]
    words += ["--scenario", scenario.name]
    command = [sys.executable, "-m", "torch.distributed.run", *words, "--rounds", str(rounds)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    times: Times = json.loads(done.stdout.splitlines()[-1])
    return times


def run_rank(scenario: Scenario, rounds: int) -> None:
    """What each of them does."""
    dist.init_process_group("gloo")
    times = measure(scenario, rounds)
    if dist.get_rank() == 0:
        print("\n" + json.dumps(times), flush=True)
    dist.destroy_process_group()


def table(name: str, times: Times) -> dict[str, dict[str, Spread]]:
    """Print a scenario, and give its numbers."""
    print(f"\n{name}, microseconds a batch: median [quartiles]")
    print(f"{'':24}{'in all':>24}{'above plain':>24}{'of what Fabric adds':>24}")
    rows = {}
    for tool, taken in times.items():
        row = {
            "time": Spread.of(taken),
            "above": per_round(lambda a, b: a - b, taken, times[PLAIN]),
            "of_fabric": share(times, tool, FABRIC),
        }
        rows[tool] = row
        print(f"{tool:24}" + "".join(f"{one!s:>24}" for one in row.values()), flush=True)
    return rows


def promises(name: str, times: Times) -> list[Target]:
    """The targets of a scenario."""
    return [
        Target(f"{name}: bare, of what Fabric adds", share(times, OURS, FABRIC), 0.5),
        Target(f"{name}: default, of what Fabric adds", share(times, OURS_AS_IT_IS, FABRIC), 0.8),
        Target(f"{name}: default, of Lightning's", share(times, OURS_AS_IT_IS, LIGHTNING), 0.12),
    ]


def share(times: Times, tool: str, of: str) -> Spread:
    """What a tool adds to plain PyTorch, divided by what another one adds."""
    return per_round(
        lambda a, b, plain: (a - plain) / (b - plain), times[tool], times[of], times[PLAIN]
    )


if __name__ == "__main__":
    main()
