"""Under each scheduler's variables two processes train to the end, with nothing repeated."""

from __future__ import annotations

import socket
import sys
import types
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from launched import ends, only, run_forks, train_here
from support import free_port

from dream_trainer.configs import DeviceParameters
from dream_trainer.errors import ConfigError
from dream_trainer.storage import Ranks
from dream_trainer.trainer.run_directory import fresh_experiment_name
from dream_trainer.world.launchers import find_launcher, job_id
from dream_trainer.world.strategy import fabric_arguments

pytestmark = pytest.mark.may_leave("rng")

Variables = dict[str, str]


def slurm(rank: int, size: int, **more: str) -> Variables:
    return {
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NAME": "train.sh",
        "SLURM_STEP_ID": "0",
        "SLURM_NTASKS": str(size),
        "SLURM_NTASKS_PER_NODE": str(size),
        "SLURM_NNODES": "1",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "SLURM_NODEID": "0",
        "SLURM_NODELIST": "127.0.0.1",
    } | more


def lsf(rank: int, size: int, folder: Path) -> Variables:
    hosts = folder / "ranks"
    hosts.write_text("\n".join(["launch-node", *[socket.gethostname()] * size]))
    return {
        "LSB_JOBID": "4711",
        "LSB_DJOB_RANKFILE": str(hosts),
        "JSM_NAMESPACE_SIZE": str(size),
        "JSM_NAMESPACE_RANK": str(rank),
        "JSM_NAMESPACE_LOCAL_RANK": str(rank),
    }


def kubeflow(rank: int, size: int) -> Variables:
    return {
        "KUBERNETES_PORT": "tcp://10.0.0.1:443",
        "HOSTNAME": f"digits-{'master' if rank == 0 else 'worker'}-0",
        "MASTER_ADDR": "127.0.0.1",
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
    }


def finished(folder: Path, ranks: list[Variables], function: Any = train_here) -> list[Any]:
    port = str(free_port())
    given = [{"MASTER_PORT": port} | own for own in ranks]
    run_forks(function, folder, folder=folder, ranks=given)
    found = ends(folder)
    assert [end["rank"] for end in found] == [0, 1]
    assert only([(e["size"], e["step"], e["experiment"], e["digest"]) for e in found])[:2] == (2, 8)
    return found


# ---------------------------------------------------------------------- two ranks to the end


@pytest.mark.distributed
def test_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = finished(tmp_path, [slurm(0, 2), slurm(1, 2)])
    assert (first["environment"], first["local_rank"], second["local_rank"]) == (
        "SLURMEnvironment",
        0,
        1,
    )


@pytest.mark.distributed
def test_slurm_on_two_nodes(tmp_path: Path) -> None:
    of_nodes = {"SLURM_NTASKS_PER_NODE": "1", "SLURM_NNODES": "2", "SLURM_LOCALID": "0"}
    ranks = [slurm(rank, 2, **of_nodes, SLURM_NODEID=str(rank)) for rank in (0, 1)]
    found = finished(tmp_path, ranks)
    assert [(e["node_rank"], e["local_rank"], e["num_nodes"]) for e in found] == [
        (0, 0, 2),
        (1, 0, 2),
    ]


@pytest.mark.distributed
def test_lsf(tmp_path: Path) -> None:
    found = finished(tmp_path, [lsf(rank, 2, tmp_path) for rank in (0, 1)])
    assert only([end["environment"] for end in found]) == "LSFEnvironment"


@pytest.mark.distributed
def test_kubeflow(tmp_path: Path) -> None:
    found = finished(tmp_path, [kubeflow(rank, 2) for rank in (0, 1)])
    assert only([end["environment"] for end in found]) == "KubeflowEnvironment"
    assert [end["node_rank"] for end in found] == [0, 1]  # a pod is a machine


class Communicator:
    """What Fabric uses of MPI's, over a store."""

    COMM_TYPE_SHARED = 0

    def __init__(self, rank: int, size: int, port: int) -> None:
        self.rank, self.size, self.calls = rank, size, 0
        timeout = timedelta(seconds=30)
        self.store = dist.TCPStore("127.0.0.1", port, size, rank == 0, timeout)

    def Get_size(self) -> int:  # noqa: N802
        return self.size

    def Get_rank(self) -> int:  # noqa: N802
        return self.rank

    def gather(self, value: str, root: int) -> list[str] | None:
        self.calls += 1
        self.store.set(f"{self.calls} {self.rank}", value)
        values = [self.store.get(f"{self.calls} {rank}").decode() for rank in range(self.size)]
        return values if self.rank == root else None

    def bcast(self, value: Any, root: int) -> Any:
        self.calls += 1
        if self.rank == root:
            self.store.set(str(self.calls), repr(value))
        return eval(self.store.get(str(self.calls)))

    def Split(self, color: int) -> Communicator:  # noqa: N802
        return self

    def Split_type(self, kind: int) -> Communicator:  # noqa: N802
        return self


def train_under_mpi(folder: Path) -> None:
    import os

    from lightning.fabric.plugins.environments import mpi

    rank, size, port = (int(os.environ.pop(f"TEST_{n}")) for n in ("RANK", "SIZE", "PORT"))
    module = types.ModuleType("mpi4py")
    module.MPI = types.SimpleNamespace(
        COMM_WORLD=Communicator(rank, size, port), Comm=Communicator, COMM_TYPE_SHARED=0
    )
    sys.modules["mpi4py"] = module
    mpi._MPI4PY_AVAILABLE = True
    train_here(folder)


@pytest.mark.distributed
def test_mpi(tmp_path: Path) -> None:
    """Without an MPI: the communicator is ours."""
    own = {"TEST_SIZE": "2", "TEST_PORT": str(free_port())}
    ranks = [own | {"TEST_RANK": str(rank)} for rank in (0, 1)]
    found = finished(tmp_path, ranks, train_under_mpi)
    assert only([end["environment"] for end in found]) == "MPIEnvironment"


# ---------------------------------------------------------------------- what does not fit


@pytest.fixture
def under(monkeypatch: pytest.MonkeyPatch) -> Callable[[Variables], None]:
    def set_all(variables: Variables) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_all


TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "RANK": "0"}


@pytest.mark.parametrize(
    ("variables", "options", "message"),
    [
        (
            TORCHRUN,
            {"devices": 4},
            "device_parameters: devices=4 asks for 4 processes on each machine, torchrun started "
            '2\nLeave devices at "auto" and num_nodes at 1, or start them with --nproc-per-node 4.',
        ),
        (
            TORCHRUN,
            {"devices": "1,"},
            "device_parameters: devices='1,' asks for 1 process on each machine, torchrun started "
            '2\nLeave devices at "auto" and num_nodes at 1, or start them with --nproc-per-node 1.',
        ),
        (
            slurm(0, 2),
            {"num_nodes": 3},
            "device_parameters: num_nodes=3, SLURM started processes on 1\n"
            'Leave devices at "auto" and num_nodes at 1, or start them on 3 machines.',
        ),
        (
            slurm(0, 1),
            {"devices": 2},
            "device_parameters: devices=2 asks for 2 processes on each machine, SLURM started 1\n"
            'Leave devices at "auto" and num_nodes at 1, or start them with --ntasks-per-node=2.',
        ),
        (
            TORCHRUN | {"WORLD_SIZE": "3"},
            {},
            "launch: torchrun started 3 processes, 2 of them on this machine, so that machines "
            "differ\nStart the same number on each: --nproc-per-node 2.",
        ),
    ],
)
def test_what_the_launcher_did_not_start_is_refused_in_two_lines(
    variables: Variables,
    options: dict[str, Any],
    message: str,
    under: Callable[[Variables], None],
) -> None:
    under(variables)
    with pytest.raises(ConfigError) as error:
        fabric_arguments(DeviceParameters(accelerator="cpu", **options))
    assert str(error.value) == message


@pytest.mark.parametrize("name", ["bash", "interactive"])
def test_a_shell_inside_slurm_is_no_launch(name: str, under: Callable[[Variables], None]) -> None:
    under(slurm(0, 2, SLURM_JOB_NAME=name))
    assert find_launcher() is None
    assert job_id(Ranks()) is None


def test_a_batch_script_without_srun_is_told(
    under: Callable[[Variables], None], capsys: pytest.CaptureFixture[str]
) -> None:
    under(slurm(0, 2, SLURM_STEP_ID=""))
    find_launcher()
    said = capsys.readouterr().err
    assert "SLURM_NTASKS=2, but srun did not start this process" in said
    assert "Put srun in front of the command." in said


@pytest.mark.parametrize(("layout", "local"), [("2", 2), ("2(x3)", 2), ("3(x2),1", 3), ("4,4", 4)])
def test_tasks_per_node_as_slurm_writes_them(
    layout: str, local: int, under: Callable[[Variables], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    under(slurm(0, 12, SLURM_STEP_TASKS_PER_NODE=layout))
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE")
    launched = find_launcher()
    assert launched is not None
    assert (launched.local, launched.nodes) == (local, 12 // local)


# ---------------------------------------------------------------------- names of jobs


JOBS: dict[str, Variables] = {
    "slurm": {"SLURM_JOB_ID": "7"},
    "array task 1": {"SLURM_JOB_ID": "8", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1"},
    "array task 2": {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"},
    "another job": {"SLURM_JOB_ID": "10"},
    "lsf": {"LSB_JOBID": "7"},
    "lsf array": {"LSB_JOBID": "7", "LSB_JOBINDEX": "2"},
    "pbs": {"PBS_JOBID": "7.server"},
    "torchrun": {"TORCHELASTIC_RUN_ID": "7"},
    "kubeflow": kubeflow(0, 2) | {"MASTER_PORT": "1"},
}


def test_each_job_has_a_name_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = []
    for variables in JOBS.values():
        with monkeypatch.context() as context:
            for name, value in variables.items():
                context.setenv(name, value)
            assert job_id(Ranks()) == job_id(Ranks())
            ids.append(job_id(Ranks()))
    assert None not in ids
    assert len({fresh_experiment_name(job) for job in ids}) == len(JOBS)


def test_a_requeued_job_keeps_its_name_and_another_command_in_it_has_another(
    under: Callable[[Variables], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--lr", "1"])
    under(slurm(0, 2))
    name = fresh_experiment_name(job_id(Ranks()))
    # A torchrun in the requeued job draws a new rendezvous.
    under({"SLURM_STEP_ID": "1", "SLURM_RESTART_COUNT": "1", "TORCHELASTIC_RUN_ID": "drawn"})
    assert fresh_experiment_name(job_id(Ranks())) == name
    monkeypatch.setattr(sys, "argv", ["train.py", "--lr", "2"])
    assert fresh_experiment_name(job_id(Ranks())) != name


def test_without_a_job_every_start_has_a_new_name() -> None:
    assert job_id(Ranks()) is None
    assert fresh_experiment_name(None) != fresh_experiment_name(None)
