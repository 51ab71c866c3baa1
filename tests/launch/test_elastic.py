"""Torchrun agents as machines: they meet, lose workers, lose each other, and the run goes on."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import train
from launched import (
    agent,
    ends,
    only,
    run_forks,
    together,
    torchrun_variables,
    train_here,
    wait_until,
)
from support import free_port, mlp

pytestmark = [
    pytest.mark.may_leave("rng"),
    pytest.mark.distributed,
    pytest.mark.timeout(900),  # several programs, each waited for by `finish`
]

#: How soon the agents notice that one of them is gone, and how long they wait for another.
QUICK = (
    "--monitor-interval 0.1 "
    "--rdzv-conf last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=2"
)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """How a run on so many ranks ends that nothing disturbs."""
    known: dict[Any, dict[str, Any]] = {}

    def end(size: int, kind: type[train.Trainer] = train.Trainer) -> dict[str, Any]:
        if (size, kind) not in known:
            folder = tmp_path_factory.mktemp("straight")
            ranks = torchrun_variables(size)
            run_forks(train_here, folder, kind, folder=folder, ranks=ranks)
            known[size, kind], *_ = ends(folder)
        return known[size, kind]

    return end


def runs(folder: Path) -> list[str]:
    return [path.name for path in (folder / "runs" / "default" / "default").iterdir()]


# ---------------------------------------------------------------------- killed workers


def killed_worker(folder: Path, rank: int, step: int, words: str) -> list[dict[str, Any]]:
    launcher = agent(
        f"--nproc-per-node 2 --max-restarts 3 --monitor-interval 0.1 {words}",
        folder,
        folder=folder,
        DIE=f"{rank}:{step}",
    )
    with together([launcher]):
        assert launcher.wait() == 0, launcher.output
    assert (folder / "died").exists()
    found = ends(folder)
    assert runs(folder) == [only([end["experiment"] for end in found])]
    # The step that it died in was not saved.
    assert only([end["resumed"] for end in found]) is (step > 1), launcher.output
    return found


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.faults)])
def test_a_worker_killed_at_random(rank: int, tmp_path: Path, straight: Any) -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    step = random.Random(seed).randint(1, 8)
    found = killed_worker(tmp_path, rank, step, f"--master-port {free_port()}")
    assert only([end["digest"] for end in found]) == straight(2)["digest"], f"seed {seed}"


@pytest.mark.faults
@pytest.mark.parametrize("rendezvous", ["static", "c10d"])
@pytest.mark.parametrize("step", range(1, 9))
@pytest.mark.parametrize("rank", [0, 1])
def test_a_worker_killed_in_each_step(
    rank: int, step: int, rendezvous: str, tmp_path: Path, straight: Any
) -> None:
    port = free_port()
    c10d = f"--rdzv-backend c10d --rdzv-endpoint 127.0.0.1:{port}"
    words = c10d if rendezvous == "c10d" else f"--master-port {port}"
    found = killed_worker(tmp_path, rank, step, words)
    assert only([end["digest"] for end in found]) == straight(2)["digest"]


# ---------------------------------------------------------------------- two machines


@pytest.mark.parametrize("local", [1, pytest.param(2, marks=pytest.mark.faults)])
def test_two_machines(local: int, tmp_path: Path, straight: Any) -> None:
    endpoint = f"127.0.0.1:{free_port()}"
    words = f"--nnodes 2 --nproc-per-node {local} --rdzv-backend c10d --rdzv-endpoint {endpoint}"
    agents = [agent(f"{words} {QUICK}", tmp_path, folder=tmp_path) for _ in range(2)]
    with together(agents):
        codes = [one.wait() for one in agents]
        assert codes == [0, 0], "\n".join(one.output for one in agents)
    found = ends(tmp_path)
    places = [(e["rank"], e["node_rank"], e["local_rank"], e["num_nodes"]) for e in found]
    assert places == [(node * local + i, node, i, 2) for node in (0, 1) for i in range(local)]
    assert only([end["digest"] for end in found]) == straight(2 * local)["digest"]
    assert runs(tmp_path) == [only([end["experiment"] for end in found])]


# ---------------------------------------------------------------------- a lost machine


class Halting(train.Trainer):
    """The rank that ``HALT`` names stays before its sixth step until it is killed.

    Ranks have random streams of their own; without dropout nothing depends on their number.
    """

    def configure_models(self) -> None:
        self.net = mlp()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.world.size == 2 and self.global_step == 5:
            (Path(self.config.ends) / f"arrived-{self.world.rank}").touch()
            if str(self.world.rank) == os.environ.get("HALT"):
                signal.pause()
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("lost", [0, 1])
def test_what_is_left_of_two_machines_goes_on(lost: int, tmp_path: Path, straight: Any) -> None:
    """In the same directory, with the same samples in each step."""
    words = f"--nnodes 1:2 --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:{free_port()}"
    agents = [
        agent(
            # The rendezvous is lost with the agent that hosts it.
            f"{words} --max-restarts 3 {QUICK},is_host={int(node != lost)}",
            tmp_path,
            Halting,
            folder=tmp_path,
            HALT=str(lost),
        )
        for node in range(2)
    ]
    with together(agents):
        arrived = wait_until(lambda: len(list(tmp_path.glob("arrived-*"))) == 2)
        assert arrived, "\n".join(one.output for one in agents)
        agents[lost].kill()
        assert agents[1 - lost].wait() == 0, agents[1 - lost].output
    (end,) = ends(tmp_path)
    assert (end["size"], end["step"], end["resumed"]) == (1, 8, True)
    assert runs(tmp_path) == [end["experiment"]]
    # Sums over one and two ranks round differently, and nothing else does.
    assert end["weights"] == pytest.approx(straight(1, Halting)["weights"], rel=1e-5)
