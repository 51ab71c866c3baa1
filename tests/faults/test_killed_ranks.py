"""One rank is killed: the others fail and do not hang, and all of them started again are exact."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from driver import KILLED, End, Job, assert_same_end, draw
from killable_run import STEPS, Split
from layouts import LAYOUTS

pytestmark = pytest.mark.distributed

SHORT = ("fsdp", "step:3:*")
EACH_STEP = [(step, rank) for step in range(1, STEPS["both"] + 1) for rank in (0, 1)]
NAMED = ["after-files:2:1", "on_boundary:3:0", "before-files:4:1", "after-manifest:3:0"]


def killed_alone(job: Job, moment: str) -> None:
    codes = job.run(moment)
    rank = int(moment.split(":")[2])
    expected = [KILLED if one == rank else 1 for one in range(job.ranks)]
    assert codes == expected, f"{job}: exit codes {codes} after {moment}"


@pytest.mark.parametrize(
    ("step", "rank"),
    [pytest.param(*c, marks=[pytest.mark.faults] * (c not in [(4, 1)])) for c in EACH_STEP],
)
def test_one_of_two_after_a_step(
    step: int, rank: int, tmp_path: Path, straight: Callable[..., End]
) -> None:
    job = Job(tmp_path, "killed", ranks=2)
    killed_alone(job, f"step:{step}:{rank}")
    assert_same_end(job.finish(), straight("both", 2), job)


@pytest.mark.parametrize(
    "moment", [pytest.param(m, marks=[pytest.mark.faults] * (m != NAMED[0])) for m in NAMED]
)
def test_one_of_two_at_a_moment_of_a_save(
    moment: str, tmp_path: Path, straight: Callable[..., End]
) -> None:
    job = Job(tmp_path, "killed", ranks=2)
    killed_alone(job, moment)
    assert_same_end(job.finish(), straight("both", 2), job)


@pytest.mark.faults
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("number", range(10))
def test_one_of_two_inside_a_save(
    rank: int,
    number: int,
    tmp_path: Path,
    straight: Callable[..., End],
    marks: Callable[..., list[int]],
) -> None:
    rng = draw("one of two", rank, number)
    # Not the last: a rank killed at the very end would find the others gone already.
    *ends, _, _ = [0, *marks("in-save", "both", 2, rank)]
    part = rng.randrange(len(ends) - 1)
    job = Job(tmp_path, "killed", "both", rng.choice([0, 2]), ranks=2)
    killed_alone(job, f"in-save:{rng.randint(ends[part] + 1, ends[part + 1])}:{rank}")
    assert_same_end(job.finish(), straight("both", 2), job)


@pytest.mark.parametrize(
    "step", [pytest.param(n, marks=[pytest.mark.faults] * (n != 4)) for n in range(2, 7)]
)
def test_three_ranks(step: int, tmp_path: Path, straight: Callable[..., End]) -> None:
    # Sums of three depend on the order, which DDP's buckets decide; sums of two do not.
    job = Job(tmp_path, "killed", ranks=3)
    job.killed(f"step:{step}:*")
    assert_same_end(job.finish(), straight("both", 3), job)


#: A kill of all ranks, of one, and one inside of a save.
IN_LAYOUTS = ["step:3:*", "step:4:1", "after-files:5:*"]


@pytest.mark.parametrize(
    ("layout", "moment"),
    [
        pytest.param(layout, moment, marks=[pytest.mark.faults] * ((layout, moment) != SHORT))
        for layout in ("fsdp", "hsdp", "tp", "fsdp-tp")
        for moment in IN_LAYOUTS
    ],
)
def test_a_sharded_or_split_run(layout: str, moment: str, tmp_path: Path) -> None:
    ranks = LAYOUTS[layout].size
    straight, killed = (
        Job(tmp_path, name, ranks=ranks, kind=Split, layout=layout)
        for name in ("straight", "killed")
    )
    killed.killed(moment)
    assert_same_end(killed.finish(), straight.finish(), killed)
